"""Weights of a silent network as those of one with sound, to train on from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Shaped

from jvdit.models.kinds import SUFFIXES

_SOUND = SUFFIXES[1]


def lacks_sound(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a network has sound that the weights of another don't."""
    ours, theirs = (flatten_dict(x, sep="/") for x in (wanted, held))
    return any("sound" in path for path in ours) and not any(
        "sound" in path for path in theirs
    )


def grown(
    held: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fresh: Callable[[Sequence[str]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The weights of a network with sound, from those of one of the same size without.

    Sound begins with the attention and modulation of pictures. Its projections in and
    out are new, so that pictures are at first what they were.

    Args:
        held: weights of the silent network.
        wanted: shapes of those of the network with sound.
        fresh: makes the initial weights at some paths.
    """
    theirs: dict[str, Any] = flatten_dict(held, sep="/")
    ours: dict[str, Any] = flatten_dict(wanted, sep="/")
    source = {
        path: path.replace(_SOUND, "").replace("own_blocks/", "blocks/")
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
    """The first layers of a stack for the blocks that have their own, then the rest."""
    if value.ndim != len(shape) or value.shape[1:] != shape[1:]:
        return value
    return value[: shape[0]] if "own_blocks/" in path else value[-shape[0] :]
