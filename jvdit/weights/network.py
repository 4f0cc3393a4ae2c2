"""A network of a finished model: its module, and where its parameters lie."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

# A tree of parameters, or what brings one to the devices, each time anew.
Parameters = Any | Callable[[], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network.

    Attributes:
        module: with its sizes.
        source: of its parameters.
        num_bytes: of what a function brings; 0 of a tree.
    """

    module: Any
    source: Parameters
    num_bytes: int = 0

    def load(self) -> Any:
        """Its parameters, brought anew where a function does."""
        return self.source() if callable(self.source) else self.source

    @cached_property
    def params(self) -> Any:
        """Its parameters, which stay."""
        return self.load()
