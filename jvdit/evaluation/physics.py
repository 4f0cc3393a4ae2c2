"""Physics scores: whether objects move, fall and bounce as in the procedural world.

Units are those of `world.scene`, dimension names those of `tracks`.
"""

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import GRAVITY, HALF_EXTENTS, Scenes
from jvdit.evaluation.tracks import Bounces, Tracks, beat, quantile

_NEAR = 2 / 64  # most distance of a bounce from its wall; twice that between objects
_FIRM = 1.2 / 64  # short sides per frame: restitution isn't measured at lower speeds
_FASTEST = 2.4  # short sides per second; whatever moves faster has teleported
_MOVING = 0.5 / 64  # short sides per frame: least speed of an object that moves
_MOST_RESIDUAL = 0.5  # 1/64 short sides per frame squared
_LEAST_EXPLAINED = 0.75
_RESTITUTION_ERROR, _GRAVITY_ERROR = 0.12, 0.25


def physics(
    tracks: Tracks,
    bounces: Bounces,
    residual: Float[np.ndarray, " n"],
    gravity: Float[np.ndarray, " n"],
    scenes: Scenes,
    fps: float,
) -> dict[str, Float[np.ndarray, " b"]]:
    """Scores the motion in clips.

    Args:
        tracks: the tracks of the captioned objects.
        bounces: their bounces.
        residual: residual acceleration of each object, from `find_bounces`.
        gravity: measured downward acceleration of each object, from `falling`.
        scenes: the scenes that the captions describe, with their walls.
        fps: frames per second.

    Returns:
        For each clip, NaN where there is nothing to measure: "residual", the mean
        acceleration apart from bounces; "explained", the share of bounces at a wall or
        another object, and away from it; "restitution", the median ratio of the speeds
        after and before a wall; "reflection", the median difference of the angles in
        and out, in degrees; "gravity", the measured acceleration relative to the
        world's; "teleport", 1 if an object is suddenly elsewhere, else 0; "moving", the
        share of objects that move; "physics", 1 if all of these are right, else 0.
    """
    count, clip = len(scenes.ids), tracks.clip
    walls, pairs = _causes(tracks, bounces, scenes, fps)
    row = np.arange(len(bounces.track))
    into = bounces.before[row, bounces.axis]
    out = bounces.after[row, bounces.axis]
    firm = walls & (np.abs(into) > _FIRM * fps)
    same_axis, any_axis = _crowded(bounces, fps)
    firm &= ~same_axis
    alone = firm & ~any_axis
    side = 1 - bounces.axis
    angle_in = np.arctan2(-into, bounces.before[row, side])
    angle_out = np.arctan2(out, bounces.after[row, side])
    turn = np.abs((np.degrees(angle_in - angle_out) + 180) % 360 - 180)
    speed = np.linalg.norm(np.diff(tracks.centre, axis=1), axis=-1) * fps
    fastest = np.nan_to_num(quantile(speed, 1.0), nan=np.inf)
    moving = np.nan_to_num(quantile(speed, 0.5)) >= _MOVING * fps

    def share(of_object: np.ndarray) -> np.ndarray:
        return np.bincount(clip, of_object, count) / scenes.count

    of_clip = clip[bounces.track]
    scores = {
        "residual": _mean_by(clip, residual, count),
        "explained": _mean_by(of_clip, (walls | pairs).astype(float), count),
        "restitution": _median_by(of_clip[firm], -(out / into)[firm], count),
        "reflection": _median_by(of_clip[alone], turn[alone], count),
        "gravity": np.where(
            scenes.gravity, _median_by(clip, gravity / GRAVITY, count), np.nan
        ),
        "teleport": (share(fastest > _FASTEST) > 0).astype(float),
        "moving": share(moving),
    }
    return scores | {"physics": _all_right(scores, share(tracks.found) == 1)}


def _all_right(
    scores: dict[str, np.ndarray], found: Bool[np.ndarray, " b"]
) -> Float[np.ndarray, " b"]:
    """1 for each clip whose objects are all found and whose measures are all right."""
    fine = found & (scores["moving"] == 1) & (scores["teleport"] == 0)
    fine = fine & (scores["residual"] < _MOST_RESIDUAL)
    for name, least, most in (
        ("explained", _LEAST_EXPLAINED, 1),
        ("restitution", 1 - _RESTITUTION_ERROR, 1 + _RESTITUTION_ERROR),
        ("gravity", 1 - _GRAVITY_ERROR, 1 + _GRAVITY_ERROR),
    ):
        value = np.where(np.isnan(scores[name]), 1.0, scores[name])
        fine &= (least <= value) & (value <= most)
    return fine.astype(float)


def _causes(
    tracks: Tracks, bounces: Bounces, scenes: Scenes, fps: float
) -> tuple[Bool[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """Which bounces are off a wall, and which are off another object."""
    clip, slot = tracks.clip[bounces.track], tracks.slot[bounces.track]
    row, axis = np.arange(len(bounces.track)), bounces.axis
    reach = HALF_EXTENTS[scenes.shape[clip, slot], axis]
    reach = reach * tracks.radius[bounces.track, None]
    along = bounces.place[row, axis]
    change = (bounces.after - bounces.before)[row, axis]
    low, high = (scenes.arena[clip, i, axis] for i in (0, 1))
    walls = (np.abs(along - reach[:, 0] - low) < _NEAR) & (change > 0)
    walls |= (np.abs(along + reach[:, 1] - high) < _NEAR) & (change < 0)

    pairs = np.zeros(len(row), bool)
    by_slot = np.full(scenes.present.shape, -1)
    by_slot[tracks.clip, tracks.slot] = np.arange(len(tracks.clip))
    part = np.clip(bounces.time * fps - bounces.interval, 0, 1)[:, None]
    for other in by_slot[clip].T:
        path = tracks.whole[other]
        there = path[row, bounces.interval] * (1 - part)
        there = there + path[row, bounces.interval + 1] * part
        apart = bounces.place - there
        touch = tracks.radius[bounces.track] + tracks.radius[other]
        near = np.abs(np.linalg.norm(apart, axis=-1) - touch) < 2 * _NEAR
        pushed = change * apart[row, axis] > 0
        pairs |= (other >= 0) & (other != bounces.track) & near & pushed
    return walls, pairs


def _crowded(
    bounces: Bounces, fps: float
) -> tuple[Bool[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """Finds bounces too close in time to another of the same object to measure speeds.

    Returns:
        Whether another along the same axis is too close, and whether one along any is.
    """
    apart = np.abs(bounces.interval[:, None] - bounces.interval)
    same = bounces.track[:, None] == bounces.track
    np.fill_diagonal(same, False)
    same_axis = same & (bounces.axis[:, None] == bounces.axis)
    mixed = (same_axis & (apart < 1 + beat(fps))).any(1)
    return mixed, (same & (apart < 2 + beat(fps))).any(1)


def _mean_by(group: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    kept = np.isfinite(value)
    total = np.bincount(group[kept], value[kept], count)
    size = np.bincount(group[kept], minlength=count)
    return np.where(size > 0, total / np.maximum(size, 1), np.nan)


def _median_by(group: np.ndarray, value: np.ndarray, count: int) -> np.ndarray:
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    size = np.bincount(group, minlength=count)
    start = np.concatenate([[0], np.cumsum(size)[:-1]])
    some = size > 0
    median = np.full(count, np.nan)
    lower = (start + (size - 1) // 2)[some]
    upper = (start + size // 2)[some]
    median[some] = (value[lower] + value[upper]) / 2
    return median
