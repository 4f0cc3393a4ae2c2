"""Tracks the captioned objects of clips, and finds their bounces.

Units are those of `world.scene`: the short side of the frame is 1, y points down, time
is in seconds. Positions are in the scene: the camera's pan is subtracted. Dimension
names: n captioned objects of all clips, m bounces.
"""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jvdit.data.world.scene import PAN_REACH, Scenes
from jvdit.evaluation.detection import Detections

_SEEN, _SEEN_BEHIND_BAR = 0.60, 0.40  # least share of frames that show a found object
_WHOLE = 0.93  # least share of its area that is visible of an object not behind a bar
_PAN_SHARE = 0.25  # largest camera shift, as a share of the short side
_PAN_SECONDS = 0.6  # time over which the camera's movement is smooth
_LEAST_GAIN = 0.02  # least gain in error by which a shift must beat no shift


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
    radius: Float[np.ndarray, " n"]


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


def quantile(x: Float[np.ndarray, "n *rest"], q: float) -> Float[np.ndarray, " n"]:
    """The q-quantile of each row's numbers that aren't NaN; NaN if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(x.reshape(len(x), -1), q, axis=1)


def enough_frames(scenes: Scenes) -> Float[np.ndarray, "b 1"]:
    """The least share of frames that must show an object's color for it to be found."""
    return np.where(scenes.bar, _SEEN_BEHIND_BAR, _SEEN)[:, None]


def follow(
    video: UInt8[np.ndarray, "b T H W 3"],
    found: Detections,
    scenes: Scenes,
    fps: float,
) -> Tracks:
    """Tracks each captioned object by its color, which is unique in its scene.

    Args:
        video: the clips, RGB in [0, 255].
        found: the detections in the clips, from `detect`.
        scenes: the scenes that the captions describe.
        fps: frames per second.
    """
    clip, slot = np.nonzero(scenes.present)
    color = scenes.color[clip, slot]
    seen = found.present[clip, :, color]
    area = np.where(seen, found.area[clip, :, color] / found.side**2, np.nan)
    shift = np.zeros(video.shape[:2])
    panned = np.flatnonzero(scenes.pan)
    start = PAN_REACH * scenes.pan[panned, None]
    shift[panned] = camera_shift(video[panned], fps) / found.side - start
    centre = found.centre[clip, :, color] / found.side
    centre[..., 0] -= shift[clip]
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


def camera_shift(
    video: UInt8[np.ndarray, "b T H W 3"], fps: float
) -> Float[np.ndarray, "b T"]:
    """Pixels by which the grey scenery of each frame has moved right since the first.

    The mean brightness of each column, without objects, is compared with that of the
    first frame at every half pixel; a parabola through the best three refines the
    shift, and lines fitted to neighbouring frames smooth it.
    """
    height, width = video.shape[2:4]
    high = np.maximum(np.maximum(video[..., 0], video[..., 1]), video[..., 2])
    low = np.minimum(np.minimum(video[..., 0], video[..., 1]), video[..., 2])
    grey = high - low < 24
    profile = np.where(grey, high, 0).sum(2) / np.maximum(grey.sum(2), 1)
    profile -= profile.mean(-1, keepdims=True)
    profile /= profile.std(-1, keepdims=True) + 1e-3
    reach = round(2 * _PAN_SHARE * min(height, width))
    shifts = np.arange(-reach, reach + 1) / 2
    errors = np.stack([_mismatch(profile, shift) for shift in shifts], -1)
    best = errors.argmin(-1).clip(1, len(shifts) - 2)
    left, middle, right = (
        np.take_along_axis(errors, best[..., None] + i, -1)[..., 0] for i in (-1, 0, 1)
    )
    bend = np.maximum(left - 2 * middle + right, 1e-6)
    refined = shifts[best] + 0.5 * np.clip(0.5 * (left - right) / bend, -0.5, 0.5)
    moved = errors[..., reach] - errors.min(-1, initial=np.inf) > _LEAST_GAIN
    window = min(round(_PAN_SECONDS * fps), video.shape[1]) // 2 * 2 - 1
    refined = np.where(moved, refined, 0.0)
    if window < 3 or not len(video):
        return refined
    # The import takes half a second, which every start of a training would wait for.
    from scipy.signal import savgol_filter

    return np.asarray(savgol_filter(refined, window, 1))


def _mismatch(profile: np.ndarray, shift: float) -> np.ndarray:
    """Mean squared difference from the first frame's profile, shifted right."""
    width = profile.shape[-1]
    x = np.arange(width) - shift
    inside = (x >= 0) & (x <= width - 1)
    x = x[inside]
    whole = np.minimum(x.astype(int), width - 2)
    part = x - whole
    first = profile[:, :1]
    moved = first[..., whole] * (1 - part) + first[..., whole + 1] * part
    return np.square(profile[..., inside] - moved).mean(-1)


def beat(fps: float) -> int:
    """Frames over which speeds and accelerations are measured: an eighth of a second.

    The error of a position doesn't depend on the frame rate, but the motion between two
    frames does.
    """
    return max(1, round(fps / 8))


def falling(tracks: Tracks, scenes: Scenes, fps: float) -> Float[np.ndarray, " n"]:
    """Measures each object's downward acceleration, in short sides per second squared.

    It is 0 for objects whose caption doesn't mention gravity.
    """
    h, y = beat(fps), tracks.whole[..., 1]
    bend = y[:, 2 * h :] - 2 * y[:, h:-h] + y[:, : -2 * h]
    measured = np.nan_to_num(quantile(bend, 0.5)) * (fps / h) ** 2
    return np.where(scenes.gravity[tracks.clip], measured, 0.0)


def find_bounces(
    tracks: Tracks, gravity: Float[np.ndarray, " n"], fps: float
) -> tuple[Bounces, Float[np.ndarray, " n"]]:
    """Finds sudden changes of velocity, and the residual acceleration apart from them.

    Between two frames an object follows its old line up to the bounce and its new line
    after it, so the time of the bounce is where the two lines meet.

    Args:
        tracks: the tracks of the objects.
        gravity: downward acceleration of each, from `falling`.
        fps: frames per second.

    Returns:
        The bounces; and for each object the upper quartile of its acceleration apart
        from them, in 1/64 short sides per squared `beat`, NaN if it is never seen.
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
    # The mean step per frame before the bounce, and after it.
    start, end = np.maximum(k - h, 0), np.minimum(k + 1 + h, frames - 1)
    before = (path[track, k] - path[track, start]) / (k - start)[:, None]
    after = (path[track, end] - path[track, k + 1]) / (end - k - 1)[:, None]
    change = before[row, axis] - after[row, axis]
    rest = path[track, k + 1] - path[track, k] - after
    part = np.clip(rest[row, axis] / change, -0.3, 1.3)
    place = path[track, k] + step[track, k] * np.clip(part, 0, 1)[:, None]
    place[row, axis] = (path[track, k] + before * part[:, None])[row, axis]
    time = (k + part) / fps
    place[:, 1] += 0.5 * gravity[track] * time**2
    pull = np.stack([np.zeros_like(time), gravity[track] * time], -1)
    bend = path[:, 2 * h :] - 2 * path[:, h:-h] + path[:, : -2 * h]
    for offset in range(-2 * h, h + 1):
        at = k + offset
        kept = (at >= 0) & (at < frames - 2 * h)
        bend[track[kept], at[kept], axis[kept]] = np.nan
    bounces = Bounces(
        track, k, axis, time, place, before * fps + pull, after * fps + pull
    )
    return bounces, 64 * quantile(np.abs(bend), 0.75)
