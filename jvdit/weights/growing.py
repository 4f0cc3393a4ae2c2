"""Weights of a network as those of one with more parts, to train on from."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

from jvdit.models.kinds import SUFFIXES
from jvdit.models.layers import stack_of

_SOUND = SUFFIXES[1]
_PARTS = "sound", "/skip/", "cond_embed"


def lacks_parts(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a network has a part that the weights of another don't have."""
    ours, theirs = (" ".join(flatten_dict(x, sep="/")) for x in (wanted, held))
    return any(part in ours and part not in theirs for part in _PARTS)


def grown(
    held: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fresh: Callable[[Sequence[str]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The weights of a network with such parts, from those of one of its size without.

    Sound begins with the attention and modulation of pictures. Its projections in and
    out, those of skips and of channels beside the noise are new, so that pictures are
    at first what they were.

    Args:
        held: weights of the network without.
        wanted: shapes of those of the network with them.
        fresh: makes the initial weights at some paths.
    """
    theirs: dict[str, Any] = flatten_dict(held, sep="/")
    ours: dict[str, Any] = flatten_dict(wanted, sep="/")
    source = {
        path: re.sub(r"^blocks_\d+/", "blocks/", path.replace(_SOUND, ""))
        for path in ours
    }
    found = dict(fresh([path for path in ours if source[path] not in theirs]))
    for path, leaf in ours.items():
        if path not in found:
            found[path] = _layers(theirs[source[path]], path, leaf.shape)
    return unflatten_dict(found, sep="/")


def _layers(
    value: Shaped[Any, "..."], path: str, shape: tuple[int, ...]
) -> Shaped[Any, "..."]:
    """The layers of a stack that are in one of its parts."""
    found = stack_of(path.partition("/")[0])
    return value if found is None else value[found[1] : found[1] + shape[0]]
