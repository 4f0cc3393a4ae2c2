"""Tracks the captioned objects of clips, and finds their bounces.

Units are those of `world.scene`: the short side of the frame is 1, y points down, time
is in seconds. Positions are in the scene: the camera's pan is subtracted. Dimension
names: n captioned objects of all clips, m bounces.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from jvdit.data.world.scene import PAN_REACH, Scenes
from jvdit.evaluation.oracle.detection import Detections

_FLIGHT = 2  # beats before and after a bounce in which its speeds are measured
_SEEN, _SEEN_BEHIND_BAR = 0.60, 0.40  # least share of frames that show a found object
_WHOLE = 0.93  # least share of its area that is visible of an object not behind a bar

PerClip = Float[np.ndarray, " b"]
PerObject = Float[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True)
class Tracks:
    """The tracks of the captioned objects, each identified by its color.

    Attributes:
        clip, slot: index of the object's clip, and of the object in its scene.
        color: its color, index in `COLORS`.
        found: whether enough frames show it.
        centre: centroid (x, y) in each frame; NaN where it isn't seen.
        whole: centroid (x, y) in each frame; NaN also where a bar hides a part of it.
        area: area in squared short sides; NaN where it isn't seen.
        radius: radius of a disc of the object's area; NaN if it is never seen.
    """

    clip: Int[np.ndarray, " n"]
    slot: Int[np.ndarray, " n"]
    color: Int[np.ndarray, " n"]
    found: Bool[np.ndarray, " n"]
    centre: Float[np.ndarray, "n T 2"]
    whole: Float[np.ndarray, "n T 2"]
    area: Float[np.ndarray, "n T"]
    radius: PerObject


@dataclasses.dataclass(frozen=True)
class Bounces:
    """Bounces: sudden changes of velocity along one axis.

    Attributes:
        track: index of the object's track.
        interval: index of the frame before the bounce.
        axis: axis along which the velocity changes, 0 for x and 1 for y.
        time: time of the bounce in seconds, between two frames.
        place: centroid (x, y) at that time.
        before, after: velocity (x, y) before and after, in short sides per second.
    """

    track: Int[np.ndarray, " m"]
    interval: Int[np.ndarray, " m"]
    axis: Int[np.ndarray, " m"]
    time: Float[np.ndarray, " m"]
    place: Float[np.ndarray, "m 2"]
    before: Float[np.ndarray, "m 2"]
    after: Float[np.ndarray, "m 2"]


def quantile(x: Float[np.ndarray, "n *rest"], q: float) -> PerObject:
    """The q-quantile of each row's numbers that aren't NaN; NaN if there are none."""
    ordered = np.sort(x.reshape(len(x), -1), axis=1)  # NaN come last
    last = np.maximum(np.isfinite(ordered).sum(1) - 1, 0)
    low = np.floor(q * last).astype(int)
    row = np.arange(len(x))
    one, two = ordered[row, low], ordered[row, np.minimum(low + 1, last)]
    return one + (two - one) * (q * last - low)


def median_by(
    group: Int[np.ndarray, " n"], value: PerObject, count: int
) -> Float[np.ndarray, " count"]:
    """The median of the values of each of `count` groups; NaN if there are none."""
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


def largest_by(
    group: Int[np.ndarray, " n"], value: PerObject, count: int
) -> Float[np.ndarray, " count"]:
    """The largest value of each of `count` groups; NaN if all are NaN, or none is."""
    largest = np.full(count, -np.inf)
    np.maximum.at(largest, group, np.nan_to_num(value, nan=-np.inf))
    return np.where(np.isfinite(largest), largest, np.nan)


def enough_frames(scenes: Scenes) -> Float[np.ndarray, "b 1"]:
    """The least share of frames that must show an object's color for it to be found."""
    return np.where(scenes.bar, _SEEN_BEHIND_BAR, _SEEN)[:, None]


def follow(
    found: Detections, shift: Float[np.ndarray, "b T"], scenes: Scenes
) -> Tracks:
    """Tracks each captioned object by its color, which is unique in its scene.

    Args:
        found: the detections in the clips, from `detect`.
        shift: the camera's shift of each frame in pixels, from `camera_shift`; used
            where the caption tells of a pan.
        scenes: the scenes that the captions describe.
    """
    clip, slot = np.nonzero(scenes.present)
    color = scenes.color[clip, slot]
    seen = found.present[clip, :, color]
    area = np.where(seen, found.area[clip, :, color] / found.side**2, np.nan)
    pan = scenes.pan[:, None]
    offset = np.where(pan != 0, shift / found.side - PAN_REACH * pan, 0.0)
    centre = found.centre[clip, :, color] / found.side
    centre[..., 0] -= offset[clip]
    centre = np.where(seen[..., None], centre, np.nan)
    radius = np.sqrt(quantile(area, 0.6) / np.pi)
    hidden = scenes.bar[clip, None] & ~(area > _WHOLE * np.pi * radius[:, None] ** 2)
    return Tracks(
        clip=clip,
        slot=slot,
        color=color,
        found=seen.mean(1) >= enough_frames(scenes)[clip, 0],
        centre=centre,
        whole=np.where(hidden[..., None], np.nan, centre),
        area=area,
        radius=radius,
    )


def beat(fps: float) -> int:
    """Frames over which speeds and accelerations are measured: an eighth of a second.

    The error of a position doesn't depend on the frame rate, but the motion between two
    frames does.
    """
    return max(1, round(fps / 8))


def falling(tracks: Tracks, fps: float, bounces: Bounces | None = None) -> PerObject:
    """Measures each object's downward acceleration, in short sides per second squared.

    It is 0 for objects that are never seen.

    Args:
        tracks: the tracks of the objects.
        fps: frames per second.
        bounces: their bounces, over which nothing is measured. None: they aren't known
            yet, and the median is taken, which a few of them don't change.
    """
    h, y = beat(fps), tracks.whole[..., 1]
    bend = y[:, 2 * h :] - 2 * y[:, h:-h] + y[:, : -2 * h]
    if bounces is None:
        return np.nan_to_num(quantile(bend, 0.5)) * (fps / h) ** 2
    total, weight = np.zeros(len(y)), np.zeros(len(y))
    hit = np.zeros((len(y), y.shape[1] - 1), int)
    hit[bounces.track, bounces.interval] = 1
    hits = np.pad(np.cumsum(hit, 1), ((0, 0), (1, 0)))
    for span in (h, 2 * h):
        bend = y[:, 2 * span :] - 2 * y[:, span:-span] + y[:, : -2 * span]
        free = np.isfinite(bend) & (hits[:, 2 * span :] == hits[:, : -2 * span])
        total += span**2 * np.where(free, bend, 0).sum(1)
        weight += span**4 * free.sum(1)
    return total / np.maximum(weight, 1) * fps**2


def find_bounces(tracks: Tracks, gravity: PerObject, fps: float) -> Bounces:
    """Finds sudden changes of velocity.

    Between two frames an object follows its old line up to the bounce and its new line
    after it, so the time of the bounce is where the two lines meet.

    Args:
        tracks: the tracks of the objects.
        gravity: downward acceleration of each, from `falling`.
        fps: frames per second.
    """
    frames = tracks.whole.shape[1]
    fallen = 0.5 * gravity[:, None] * (np.arange(frames) / fps) ** 2
    path = tracks.whole - np.stack([np.zeros_like(fallen), fallen], -1)
    step = np.diff(path, axis=1)
    usual = np.nan_to_num(quantile(np.linalg.norm(step, axis=-1), 0.5))
    least = np.maximum(0.7 / 64, 0.25 * usual)[:, None, None]
    jump = np.nan_to_num(np.abs(step[:, 2:] - step[:, :-2]), nan=-1.0)
    around = np.pad(jump, ((0, 0), (1, 1), (0, 0)), constant_values=-1)
    peak = (jump > least) & (jump >= around[:, :-2]) & (jump > around[:, 2:])
    track, first, axis = np.nonzero(peak)
    k = first + 1  # the bounce is between frames k and k + 1
    row, h = np.arange(len(track)), beat(fps)
    before, after = _steps(path, track, k, axis, h)
    change = before[row, axis] - after[row, axis]
    rest = path[track, k + 1] - path[track, k] - after
    part = np.clip(rest[row, axis] / change, -0.3, 1.3)
    place = path[track, k] + step[track, k] * np.clip(part, 0, 1)[:, None]
    place[row, axis] = (path[track, k] + before * part[:, None])[row, axis]
    time = (k + part) / fps
    place[:, 1] += 0.5 * gravity[track] * time**2
    pull = np.stack([np.zeros_like(time), gravity[track] * time], -1)
    return Bounces(track, k, axis, time, place, before * fps + pull, after * fps + pull)


def _steps(
    path: Float[np.ndarray, "n T 2"],
    track: Int[np.ndarray, " m"],
    k: Int[np.ndarray, " m"],
    axis: Int[np.ndarray, " m"],
    h: int,
) -> tuple[Float[np.ndarray, "m 2"], Float[np.ndarray, "m 2"]]:
    """The mean step per frame before each bounce, and after it.

    Along the bounce's own axis it is that of up to `_FLIGHT` beats, as far as there is
    no other bounce; along the other axis that of one beat.
    """
    frames, row = path.shape[1], np.arange(len(track))
    order = np.lexsort((k, track))
    same = np.diff(track[order]) == 0
    least, most = np.zeros(len(k), int), np.full(len(k), frames - 1)
    least[order[1:]] = np.where(same, np.minimum(k[order[:-1]] + 1, k[order[1:]]), 0)
    after = np.maximum(k[order[1:]], k[order[:-1]] + 1)
    most[order[:-1]] = np.where(same, after, frames - 1)
    both = []
    for at, short, long in (
        (k, np.maximum(k - h, 0), np.maximum(k - _FLIGHT * h, least)),
        (
            k + 1,
            np.minimum(k + 1 + h, frames - 1),
            np.minimum(k + 1 + _FLIGHT * h, most),
        ),
    ):
        step = (path[track, short] - path[track, at]) / (short - at)[:, None]
        far = path[track, long, axis] - path[track, at, axis]
        reached = np.isfinite(far) & (long != at)
        far /= np.where(long != at, long - at, 1)
        step[row, axis] = np.where(reached, far, step[row, axis])
        both.append(step)
    return both[0], both[1]
