"""Where the captioned objects of a clip are in every frame, and where they bounce.

Units are those of `world.scene`: the short side of the frame is 1, y points down, time
is in seconds. Positions are those in the scene: the camera's pan is taken off.
Dimensions: n captioned objects of all clips, m bounces.
"""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jvdit.data.world.scene import PAN_REACH, Scenes
from jvdit.evaluation.detection import Detections

_SEEN, _SEEN_BEHIND_BAR = 0.60, 0.40  # of the frames show an object that is there
_WHOLE = 0.93  # of its area is seen of an object that no bar hides in part
_PAN_SHARE = 0.25  # of the short side: the largest shift that is looked for
_PAN_SECONDS = 0.6  # over which a camera's movement is smooth
_LEAST_GAIN = 0.02  # by which a shift must explain the scenery better than none


@dataclasses.dataclass(frozen=True)
class Tracks:
    """The captioned objects, each looked up by its color.

    Attributes:
        clip, slot: which object of which scene.
        color: its index in `COLORS`.
        found: whether enough frames show it.
        centre: (x, y) in each frame; NaN where it isn't seen.
        whole: the same; NaN too where a bar hides a part.
        area: in squared short sides; NaN where it isn't seen.
        radius: of the disc of the object's area; NaN if it is never seen.
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
    """Sudden changes of velocity along one axis.

    Attributes:
        track: whose.
        interval: the frame before.
        axis: 0 for x, 1 for y.
        time: in seconds, between frames.
        place: (x, y) of the centroid then.
        before, after: velocity (x, y) in short sides per second.
    """

    track: Int[np.ndarray, " m"]
    interval: Int[np.ndarray, " m"]
    axis: Int[np.ndarray, " m"]
    time: Float[np.ndarray, " m"]
    place: Float[np.ndarray, "m 2"]
    before: Float[np.ndarray, "m 2"]
    after: Float[np.ndarray, "m 2"]


def quantile(x: Float[np.ndarray, "n *rest"], q: float) -> Float[np.ndarray, " n"]:
    """Of all numbers of each row that aren't NaN; NaN where there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanquantile(x.reshape(len(x), -1), q, axis=1)


def enough_frames(scenes: Scenes) -> Float[np.ndarray, "b 1"]:
    """Share of the frames that must show a color for its object to be there."""
    return np.where(scenes.bar, _SEEN_BEHIND_BAR, _SEEN)[:, None]


def follow(
    video: UInt8[np.ndarray, "b T H W 3"],
    found: Detections,
    scenes: Scenes,
    fps: float,
) -> Tracks:
    """Looks up each captioned object by its color, which no other of its scene has.

    Args:
        video: the clips.
        found: `detect(video)`.
        scenes: what their captions say.
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
    """How far the grey scenery of each frame lies right of that of the first, pixels.

    The mean brightness of each column, objects left out, is compared with that of the
    first frame at every half pixel, a parabola through the best three refines it, and
    lines are fitted to what neighbouring frames say.
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
    # Its import takes half a second, which every start of a training would wait for.
    from scipy.signal import savgol_filter

    return np.asarray(savgol_filter(refined, window, 1))


def _mismatch(profile: np.ndarray, shift: float) -> np.ndarray:
    """Mean squared difference from the first frame's profile, shifted."""
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

    The error of a position is the same at any frame rate, what it moves is not.
    """
    return max(1, round(fps / 8))


def falling(tracks: Tracks, scenes: Scenes, fps: float) -> Float[np.ndarray, " n"]:
    """Downward acceleration where the caption tells of gravity; elsewhere 0."""
    h, y = beat(fps), tracks.whole[..., 1]
    bend = y[:, 2 * h :] - 2 * y[:, h:-h] + y[:, : -2 * h]
    measured = np.nan_to_num(quantile(bend, 0.5)) * (fps / h) ** 2
    return np.where(scenes.gravity[tracks.clip], measured, 0.0)


def find_bounces(
    tracks: Tracks, gravity: Float[np.ndarray, " n"], fps: float
) -> tuple[Bounces, Float[np.ndarray, " n"]]:
    """Finds where each object's velocity changes suddenly, and how smooth it is else.

    Within the frames between which it bounces, an object follows its old line up to
    the bounce and its new one from then on: the time is where the two lines meet.

    Args:
        tracks: of the objects.
        gravity: downward acceleration of each.
        fps: frames per second.

    Returns:
        The bounces, and of each object the upper quartile of its acceleration away from
        them, in 1/64 short sides per squared `beat`; NaN if it is never seen.
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
    # Steps of the flights to the bounce and from it.
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
