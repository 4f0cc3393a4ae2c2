"""Weights of a network as those of one with more parts, or fewer, to train on from."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvdit.models.kinds import SUFFIXES
from jvdit.models.layers import stack_of
from jvdit.weights.rules import layers_of

_SOUND = SUFFIXES[1]
# Whether pictures are the same without it.
_PARTS = {"sound": True, "cond_embed": True, "/skip/": False}


def other_parts(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether weights lack a part of a network, or have one that it can do without."""
    ours, theirs = (" ".join(flatten_dict(x, sep="/")) for x in (wanted, held))
    for part, spare in _PARTS.items():
        here, there = part in ours, part in theirs
        if here != there and (here or spare):
            return True
    return False


def fitted(
    held: Mapping[str, Any],
    wanted: Mapping[str, Any],
    fresh: Callable[[Sequence[str]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The weights of a network from those of one of its size with other parts.

    Sound begins with the attention and modulation of pictures. Its projections in and
    out, those of skips and of channels beside the noise are new, so that pictures are
    at first what they were, as they are where sound is left out.

    Args:
        held: weights of the other network.
        wanted: shapes of those of the network.
        fresh: makes the initial weights at some paths.
    """
    theirs: dict[str, Any] = flatten_dict(held, sep="/")
    ours: dict[str, Any] = flatten_dict(wanted, sep="/")
    places = {
        layer: (path, i)
        for path, leaf in theirs.items()
        for i, (_, layer) in enumerate(layers_of(path, leaf.shape))
    }
    source = {
        path: [
            x if x in places else x.replace(_SOUND, "")
            for _, x in layers_of(path, leaf.shape)
        ]
        for path, leaf in ours.items()
    }
    found = dict(fresh([path for path, x in source.items() if not {*x} <= {*places}]))
    for path, layers in source.items():
        if path not in found:
            parts = [
                _rows(theirs[name], [i for _, i in rows], _is_stacked(name))
                for name, rows in itertools.groupby(
                    (places[layer] for layer in layers), lambda place: place[0]
                )
            ]
            found[path] = _joined(parts) if _is_stacked(path) else parts[0][0]
    return unflatten_dict(found, sep="/")


def _rows(value: Any, rows: Sequence[int], stacked: bool) -> Any:
    """Some layers of a stack that follow one another, or one layer as a stack."""
    return value[rows[0] : rows[-1] + 1] if stacked else value[None]


def _joined(parts: Sequence[Any]) -> Any:
    """Stacks one after another, where they are: in memory or on devices."""
    if len(parts) == 1:
        return parts[0]
    return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts)


def _is_stacked(path: str) -> bool:
    return stack_of(path.partition("/")[0]) is not None
