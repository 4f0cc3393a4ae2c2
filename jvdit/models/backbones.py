"""Backbones by name: the networks that denoise packed tokens, and their sizes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array

from jvdit.models import dit
from jvdit.shapes import Text, Tokens


@runtime_checkable
class Backbone(Protocol):
    """A Linen module `(tokens, t, text) -> velocity [b n o]`, as `DiT` is documented.

    A channel count of 0 says that it takes no such input; without `patterns` it doesn't
    ask for the frames of its tokens.
    """

    width: int
    in_channels: int
    out_channels: int
    text_width: int
    cond_channels: int
    control_channels: int
    sound_channels: int
    image_width: int
    image_length: int
    patterns: Sequence[str]
    chunk_frames: int
    dtype: DTypeLike
    init: Any
    apply: Any

    @property
    def is_causal(self) -> bool:
        """Whether no chunk of a clip sees a later one."""
        ...

    def flops(
        self, tokens: int, text: int, trained: str = "nothing", frames: int = 0
    ) -> int:
        """Floating-point operations of a row."""
        ...

    def example_inputs(self) -> tuple[Tokens, Array, Text]:
        """The smallest inputs with which it has all of its parameters."""
        ...


class Family(NamedTuple):
    """A row of `MODELS`.

    Attributes:
        module: the class.
        variants: its fields by the name of a size.
    """

    module: type[Any]
    variants: Mapping[str, Mapping[str, Any]]


MODELS = {"dit": Family(dit.DiT, dit.VARIANTS)}


def family_of(variant: str) -> str:
    """The name of the backbone that has a size of this name.

    Raises:
        ValueError: none has.
    """
    for name, family in MODELS.items():
        if variant in family.variants:
            return name
    known = ", ".join(x for family in MODELS.values() for x in family.variants)
    raise ValueError(f"{variant!r} is none of the sizes that are known: {known}.")


def name_of_backbone(module: Backbone) -> str:
    """The name of a module in `MODELS`."""
    (name,) = (name for name, x in MODELS.items() if type(module) is x.module)
    return name
