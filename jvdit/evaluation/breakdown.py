"""Breaks scores down by the content of the clips."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import MAX_OBJECTS, SHAPES, Scenes

# The scores that are reported for each part.
NAMES = ("all", "shape", "size", "direction", "physics")

Parts = dict[str, dict[str, float]]


def parts_of(scenes: Scenes) -> dict[str, Bool[np.ndarray, " b"]]:
    """Groups clips by their number of objects, and those of a single one by shape."""
    parts = {
        f"{n} object{'s' * (n > 1)}": scenes.count == n
        for n in range(1, MAX_OBJECTS + 1)
    }
    alone = scenes.count == 1
    parts |= {f"a {s}": alone & (scenes.shape[:, 0] == i) for i, s in enumerate(SHAPES)}
    return {name: chosen for name, chosen in parts.items() if chosen.any()}


def breakdown(scores: Mapping[str, Float[np.ndarray, " b"]], scenes: Scenes) -> Parts:
    """Averages the scores in `NAMES` over each part of the clips.

    Args:
        scores: scores of each clip, from `oracle.score`.
        scenes: the scenes of the same clips.

    Returns:
        For each part the mean of each score, and how many clips it has ("clips").
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
