"""One network of a finished model: its module, and the source of its parameters."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

# A tree of parameters, or a function that loads one onto the devices at every call.
Parameters = Any | Callable[[], Any]


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
