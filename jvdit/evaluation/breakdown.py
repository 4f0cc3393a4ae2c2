"""Breaks scores down by the content of the clips."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import MAX_OBJECTS, SHAPES, Scenes

# The scores that are reported for each part.
NAMES = ("all", "shape", "size", "direction", "speed", "physics")

Parts = dict[str, dict[str, float]]


def parts_of(scenes: Scenes) -> dict[str, Bool[np.ndarray, " b"]]:
    """Groups clips by their number of objects, and those of a single one by shape."""
    counts = range(1, MAX_OBJECTS + 1)
    parts = {f"{n} object{'s' * (n > 1)}": scenes.count == n for n in counts}
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


def composition(
    scores: Float[np.ndarray, " b"],
    scenes: Scenes,
    known: Float[np.ndarray, " c"],
    known_scenes: Scenes,
) -> float:
    """What new combinations of known attributes cost: their mean score minus the known.

    Clips are compared with those of as many objects, with the same shape first, under
    gravity or not, behind a bar or not.

    Args:
        scores: a score of each clip of split "comp".
        scenes: their scenes.
        known: the same score of clips of split "test".
        known_scenes: their scenes.
    """
    both = scenes, known_scenes
    groups = [np.stack([x.count, x.shape[:, 0], x.gravity, x.bar], 1) for x in both]
    total, weight = 0.0, 0
    for group in np.unique(groups[0], axis=0):
        one, two = ((x == group).all(1) for x in groups)
        if two.any():
            count = int(one.sum())
            total += count * (np.nanmean(scores[one]) - np.nanmean(known[two]))
            weight += count
    return float(total / weight) if weight else float("nan")
