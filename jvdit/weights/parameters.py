"""Saves and loads networks: their weights in a safetensors file, and their fields.

Each folder is self-contained, and a digest in it tells whether the weights have changed
since they were written.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from jvdit.machine.files import replacing
from jvdit.machine.json_files import fit_json, read_json, write_json
from jvdit.weights.few_bits import few_bits
from jvdit.weights.tensors import PathLike, TensorFiles

_DIGEST = "digest"  # key of the weights' digest in the metadata of their file


def module_fields(module: Any) -> dict[str, Any]:
    """The fields of a Linen module as JSON values."""
    return {
        field.name: json_field(field.name, getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }


def json_field(name: str, value: Any) -> Any:
    """A module's field as a JSON value: dtypes by name, tuples as lists."""
    if name.endswith("dtype"):
        return jnp.dtype(value).name
    return list(value) if isinstance(value, tuple) else value


def build(module: type, fields: dict[str, Any]) -> Any:
    """Builds a Linen module from its fields; lists, as JSON has them, become tuples."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return module(**fields)


def model_folder(folder: PathLike) -> pathlib.Path:
    """The `model` folder of a workdir, or the folder itself if it has none."""
    folder = pathlib.Path(folder)
    return folder / "model" if (folder / "model").is_dir() else folder


def save_weights(folder: PathLike, params: Any, config: Mapping[str, Any]) -> None:
    """Writes `weights.safetensors` and `config.json`.

    Args:
        folder: created if needed; each file is replaced atomically.
        params: a nested dict of arrays.
        config: JSON values that `load_weights` returns beside them.
    """
    folder = pathlib.Path(folder)
    flat = flatten_dict(params, sep="/")
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    with replacing(folder / "weights.safetensors") as scratch:
        save_file(flat, scratch, metadata={_DIGEST: weights_hash(params)})
    write_json(folder / "config.json", config)


def load_weights(folder: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote: (params, config); params are views of the file.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the weights can't be read, for example because they were cut off,
            or they have changed since they were written.
    """
    folder = pathlib.Path(folder)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    if not weights.exists() or not config.exists():
        raise FileNotFoundError(
            f"{folder} holds no model (weights.safetensors and config.json); give the "
            "`model` folder of a workdir that has saved a checkpoint."
        )
    try:
        tensors = TensorFiles(weights)
        params = unflatten_dict(dict(tensors), sep="/")
    except Exception as error:
        raise ValueError(f"{weights} can't be read ({error}); copy it anew.") from error
    # Files of other programs have no digest.
    written = tensors.metadata.get(_DIGEST)
    if written not in (None, held := weights_hash(params)):
        raise ValueError(
            f"{weights} has changed since it was written (its digest is {held}, not "
            f"{written}): copy it anew. If the change was meant, write the "
            "weights with `save_weights`, or without the metadata of the old file."
        )
    return params, read_json(config, "copy it anew", dict[str, Any])


def weights_hash(params: Any) -> str:
    """A digest of the names, shapes, dtypes and values of weights: 16 hex digits.

    Raises:
        TypeError: a leaf isn't an array; its digest would differ from run to run.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, value = jax.tree_util.keystr(path), np.asarray(leaf)
        if value.dtype == object:
            raise TypeError(f"{name} is no array but {leaf!r}.")
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


# A tree of parameters, or a function that loads one onto the devices at every call; a
# form of `few_bits` is its argument.
Parameters = Any | Callable[..., Any]


_DTYPE = Annotated[str, msgspec.Meta(pattern="^(float32|bfloat16|float16|float64)$")]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A module and its parameters.

    Attributes:
        module: the Linen module.
        source: a parameter tree, or a function that loads one onto the devices.
        shapes: of the parameters that a function loads; None for a tree.
    """

    module: Any
    source: Parameters
    shapes: Any = None

    def load(self) -> Any:
        """Returns the parameters; a function loads them again at every call."""
        return self.source() if callable(self.source) else self.source

    def num_bytes(self, form: str = "") -> int:
        """Bytes of the parameters, in a form of `few_bits` or as they are."""
        held = self.source if self.shapes is None else self.shapes
        found = jax.eval_shape(partial(few_bits, form=form), held)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

    def changed(self, change: Callable[[Any], Any]) -> "Network":
        """The same network with its parameters changed, whenever they are loaded."""
        source = self.source
        if callable(source):
            made = lambda form="": few_bits(change(source()), form)  # noqa: E731
            return dataclasses.replace(self, source=made)
        return dataclasses.replace(self, source=change(source))

    def save(self, folder: PathLike) -> None:
        """Writes the network to a folder, for `load_network`."""
        save_weights(folder, self.params, module_fields(self.module))

    @cached_property
    def params(self) -> Any:
        """The parameters, loaded once and kept."""
        return self.load()


def load_network(folder: PathLike, module: type) -> Network:
    """Loads a network that `save_weights` wrote.

    Args:
        folder: the folder of `weights.safetensors` and `config.json`.
        module: the Linen class whose fields the config holds.

    Raises:
        FileNotFoundError: there is no network in the folder.
        ValueError: a file is damaged, or is that of another network.
    """
    params, fields = load_weights(folder)
    config = f"{folder}/config.json"
    held = fit_json(fields, config, _config_of(module), "copy the folder anew")
    fitted = {name: getattr(held, name) for name in fields}
    return Network(build(module, fitted), params)


def _config_of(module: type) -> type[msgspec.Struct]:
    """The type of a `config.json` with the fields of a module."""
    fields: list[Any] = []
    for field in dataclasses.fields(module):
        kind = _DTYPE if field.name.endswith("dtype") else field.type
        required = (field.default, field.default_factory).count(dataclasses.MISSING) > 1
        if field.name not in ("parent", "name"):
            fields.append((field.name, kind, *(() if required else (None,))))
    return msgspec.defstruct(
        module.__name__, fields, kw_only=True, forbid_unknown_fields=True
    )
