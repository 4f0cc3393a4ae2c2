"""One network of a finished model: its module, and the source of its parameters."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from jvdit.machine.json_files import fit_json, nearest
from jvdit.weights.parameters import build, load_weights

# A tree of parameters, or a function that loads one onto the devices at every call.
Parameters = Any | Callable[[], Any]


_DTYPES = ("float32", "bfloat16", "float16", "float64")
_REMEDY = "copy the folder anew"


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A module and its parameters.

    Attributes:
        module: the Linen module.
        source: a parameter tree, or a function that loads one onto the devices.
        num_bytes: size of the parameters that a function loads; 0 for a tree.
    """

    module: Any
    source: Parameters
    num_bytes: int = 0

    def load(self) -> Any:
        """Returns the parameters; a function loads them again at every call."""
        return self.source() if callable(self.source) else self.source

    @cached_property
    def params(self) -> Any:
        """The parameters, loaded once and kept."""
        return self.load()


def load_network(folder: str | os.PathLike[str], module: type) -> Network:
    """Loads a network that `save_weights` wrote.

    Args:
        folder: the folder of `weights.safetensors` and `config.json`.
        module: the Linen class whose fields the config holds.

    Raises:
        FileNotFoundError: there is no network in the folder.
        ValueError: a file is damaged, or is that of another network.
    """
    params, fields = load_weights(folder)
    config = f"{os.fspath(folder)}/config.json"
    return Network(build(module, _fitted(fields, module, config)), params)


def _fitted(fields: Mapping[str, Any], module: type, config: str) -> dict[str, Any]:
    """Converts the fields of a config to the types of a module's fields.

    Raises:
        ValueError: a field is unknown, missing, or of the wrong type.
    """
    types = {field.name: field.type for field in dataclasses.fields(module)}
    fitted: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in types:
            near = nearest(name, types)
            raise ValueError(
                f"{config}: `{name}` is no field of {module.__name__}, the nearest is "
                f"`{near}`; {_REMEDY}."
            )
        kind = str if name.endswith("dtype") else types[name]
        fitted[name] = fit_json(value, f"{config}, `{name}`", kind, _REMEDY)
        if name.endswith("dtype") and value not in _DTYPES:
            raise ValueError(
                f"{config}: `{name}` (={value!r}) must be one of: {', '.join(_DTYPES)}."
            )
    required = [
        field.name
        for field in dataclasses.fields(module)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"{config} lacks `{missing[0]}`; {_REMEDY}.")
    return fitted
