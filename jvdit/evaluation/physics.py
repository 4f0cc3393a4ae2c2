"""Whether objects fly, fall and bounce as the procedural world's do.

Units are those of `world.scene`, dimensions those of `tracks`.
"""

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.scene import GRAVITY, HALF_EXTENTS, Scenes
from jvdit.evaluation.tracks import Bounces, Tracks, beat, quantile

_NEAR = 2 / 64  # of a wall, where an object may bounce; twice that between objects
_FIRM = 1.2 / 64  # short sides per frame: slower bounces have no exact restitution
_FASTEST = 2.4  # short sides per second; what moves faster has been moved
_MOVING = 0.5 / 64  # short sides per frame at the least
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
    """Scores how clips move.

    Args:
        tracks: the captioned objects.
        bounces: theirs.
        residual: of each object, from `find_bounces`.
        gravity: of each object, from `falling`.
        scenes: what the captions say, and where the walls are.
        fps: frames per second.

    Returns:
        For each clip, NaN where there is nothing to measure: "residual", mean
        acceleration away from bounces; "explained", share of the bounces that are at a
        wall or another object, and away from it; "restitution", speed after over speed
        before a wall, the median; "reflection", degrees by which angles in and out
        differ, the median; "gravity", over the world's; "teleport", whether an object
        is suddenly elsewhere; "moving", share of the objects that do; "physics",
        whether all of this is as it should be.
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
    """Whether all objects are there and nothing that is measured is wrong."""
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
    """Which bounces are off a wall, and which off another object."""
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
    """Which have another bounce of the same object so near that speeds mix.

    Returns:
        Along the same axis, and along any.
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
