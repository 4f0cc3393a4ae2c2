"""Scores of parts of a set of clips: by what is in them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import MAX_OBJECTS, SHAPES, Scenes

# Scores that are told of each part.
NAMES = ("all", "shape", "size", "direction", "physics")

Parts = dict[str, dict[str, float]]


def parts_of(scenes: Scenes) -> dict[str, Bool[np.ndarray, " b"]]:
    """Which clips are in which part: by number of objects, and single ones by shape."""
    parts = {
        f"{n} object{'s' * (n > 1)}": scenes.count == n
        for n in range(1, MAX_OBJECTS + 1)
    }
    alone = scenes.count == 1
    parts |= {f"a {s}": alone & (scenes.shape[:, 0] == i) for i, s in enumerate(SHAPES)}
    return {name: chosen for name, chosen in parts.items() if chosen.any()}


def breakdown(scores: Mapping[str, Float[np.ndarray, " b"]], scenes: Scenes) -> Parts:
    """Means of some scores over each part, and how many clips it has ("clips").

    Args:
        scores: of each clip, from `oracle.score`.
        scenes: of the same clips.
    """
    return {
        part: {"clips": float(chosen.sum())}
        | {
            name: float(np.nanmean(scores[name][chosen]))
            for name in NAMES
            if np.isfinite(scores[name][chosen]).any()
        }
        for part, chosen in parts_of(scenes).items()
    }
