"""Physics scores: whether objects move, fall and bounce as in the procedural world.

Units are those of `world.scene`, dimension names those of `tracks`.
"""

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import GRAVITY, HALF_EXTENTS, Scenes
from jvdit.evaluation.oracle.laws import foretold
from jvdit.evaluation.oracle.tracks import Bounces, Tracks, beat, median_by, quantile

_NEAR = 2 / 64  # most distance of a bounce from its wall
_FIRM = 1.2 / 64  # short sides per frame: restitution isn't measured at lower speeds
_FASTEST = 2.4  # short sides per second; whatever moves faster has teleported
_MOVING = 0.5 / 64  # short sides per frame: least speed of an object that moves
_LEAST_FORETOLD = 0.8
_FORETOLD_ERROR, _FORETOLD_PIXELS = 0.012, 0.6  # the larger of the two is tolerated
_RIGHT = {"pace": (0.8, 1.3), "gravity": (0.7, 1.3), "moving": (1, 1)}


def physics(
    tracks: Tracks,
    bounces: Bounces,
    gravity: Float[np.ndarray, " n"],
    scenes: Scenes,
    fps: float,
    side: int,
) -> dict[str, Float[np.ndarray, " b"]]:
    """Scores the motion in clips.

    Args:
        tracks: the tracks of the captioned objects.
        bounces: their bounces.
        gravity: measured downward acceleration of each object, from `falling`.
        scenes: the scenes that the captions describe, with their walls.
        fps: frames per second.
        side: the frame's short side in pixels.

    Returns:
        For each clip, NaN where there is nothing to measure: "foretold", the share of
        positions that the world's laws foretell from those before; "pace", the speed of
        the last third of the clip over what that of the first foretells;
        "restitution", the median ratio of the speeds after and before a wall;
        "gravity", the measured acceleration relative to the world's; "teleport", 1 if
        an object is suddenly elsewhere, else 0; "moving", the share of objects that
        move; "physics", 1 if all of these are right, else 0.
    """
    count, clip = len(scenes.ids), tracks.clip
    row = np.arange(len(bounces.track))
    into = bounces.before[row, bounces.axis]
    out = bounces.after[row, bounces.axis]
    firm = _at_walls(tracks, bounces, scenes) & (np.abs(into) > _FIRM * fps)
    firm &= ~_crowded(bounces, fps)
    speed = np.linalg.norm(np.diff(tracks.centre, axis=1), axis=-1) * fps
    fastest = np.nan_to_num(quantile(speed, 1.0), nan=np.inf)
    moving = np.nan_to_num(quantile(speed, 0.5)) >= _MOVING * fps

    def share(of_object: np.ndarray) -> np.ndarray:
        return np.bincount(clip, of_object, count) / scenes.count

    of_clip = clip[bounces.track]
    error = max(_FORETOLD_ERROR, _FORETOLD_PIXELS / side)
    scores = {
        "foretold": foretold(tracks, scenes, fps, error),
        "pace": _pace(tracks, bounces, scenes, fps),
        "restitution": median_by(of_clip[firm], -(out / into)[firm], count),
        "gravity": np.where(
            scenes.gravity, median_by(clip, gravity / GRAVITY, count), np.nan
        ),
        "teleport": (share(fastest > _FASTEST) > 0).astype(float),
        "moving": share(moving),
    }
    fine = (share(tracks.found) == 1) & (scores["teleport"] == 0)
    fine &= ~(scores["foretold"] < _LEAST_FORETOLD)
    for name, (least, most) in _RIGHT.items():
        fine &= ~((scores[name] < least) | (scores[name] > most))
    return scores | {"physics": fine.astype(float)}


def _at_walls(
    tracks: Tracks, bounces: Bounces, scenes: Scenes
) -> Bool[np.ndarray, " m"]:
    """Which bounces are off a wall."""
    clip, slot = tracks.clip[bounces.track], tracks.slot[bounces.track]
    row, axis = np.arange(len(bounces.track)), bounces.axis
    reach = HALF_EXTENTS[scenes.shape[clip, slot], axis]
    reach = reach * tracks.radius[bounces.track, None]
    along = bounces.place[row, axis]
    change = (bounces.after - bounces.before)[row, axis]
    low, high = (scenes.arena[clip, i, axis] for i in (0, 1))
    walls = (np.abs(along - reach[:, 0] - low) < _NEAR) & (change > 0)
    return walls | ((np.abs(along + reach[:, 1] - high) < _NEAR) & (change < 0))


def _pace(
    tracks: Tracks, bounces: Bounces, scenes: Scenes, fps: float
) -> Float[np.ndarray, " b"]:
    """Speed in the last third of clips over what the energy of the first foretells.

    The energy is that of all objects together, for they pass it on. NaN where there is
    no interval without a bounce in either third.
    """
    count, clip = len(scenes.ids), tracks.clip
    step = np.diff(tracks.centre, axis=1) * fps
    step[bounces.track, bounces.interval] = np.nan
    mass = tracks.radius[:, None] ** 2
    pull = GRAVITY * scenes.gravity[clip, None]
    height = (tracks.centre[:, 1:, 1] + tracks.centre[:, :-1, 1]) / 2
    moving, lifted = np.zeros((2, count, step.shape[1]))
    np.add.at(moving, clip, mass * np.square(step).sum(-1) / 2)
    np.add.at(lifted, clip, -mass * pull * height)
    third = min(max(step.shape[1] // 3, 3), step.shape[1])
    # A bounce that wasn't found shortens a step, so the longer ones are taken.
    energy = quantile((moving + lifted)[:, :third], 0.75)[:, None]
    foretold = energy - lifted[:, -third:]
    ratio = moving[:, -third:] / np.where(foretold > 0, foretold, np.nan)
    return np.sqrt(quantile(ratio, 0.75))


def _crowded(bounces: Bounces, fps: float) -> Bool[np.ndarray, " m"]:
    """Which bounces are too close in time to another to measure speeds.

    The other is one of the same object along the same axis.
    """
    apart = np.abs(bounces.interval[:, None] - bounces.interval)
    same = bounces.track[:, None] == bounces.track
    same &= bounces.axis[:, None] == bounces.axis
    np.fill_diagonal(same, False)
    return (same & (apart < 1 + beat(fps))).any(1)
