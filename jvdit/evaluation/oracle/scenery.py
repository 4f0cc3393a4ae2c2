"""Reads the grey scenery of clips: background, light, camera, and the bar.

The brightness of what isn't an object is fitted, in each frame, by the world's
background: a wall around an arena with stripes or a checkerboard of unknown contrast.
The levels tell the tone and the light, the contrasts the texture, and what is left
tells whether there is anything else. Units are those of `world.scene`; pixel values
are in [0, 255].
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jvdit.data.world.render import (
    BAR_LEVELS,
    TEXTURE_STEP,
    TONE_LEVELS,
    WALL_LEVELS,
    background_parts,
)
from jvdit.data.world.scene import PAN_REACH, RAMP_SECONDS, Scenes, light_course
from jvdit.evaluation.oracle.detection import Detections, Video

_ENOUGH = 32  # pixels of the short side from which on not all are read
_TOGETHER = 8  # clips that are fitted at once
_PAN_SHARE = 0.25  # largest camera shift, as a share of the short side
_PAN_SECONDS = 0.6  # time over which the camera's movement is smooth
_LEAST_GAIN = 0.02  # least gain in error by which a shift must beat no shift
_MOST_LEFT = 12.0  # pixel values, under full light, that the background leaves over
_LIGHT_ERROR = 0.08  # of the logarithm of the light's course
_BRIGHTNESS_ERROR = 0.25  # of the logarithm of its mean
_PAN_ERROR = 0.4  # share of the camera's shift


@dataclasses.dataclass(frozen=True)
class Scenery:
    """What clips show beside their objects; indices and signs as in `Scenes`.

    Attributes:
        tone, texture: of the background, indices; -1: of another kind.
        light, pan: 1, 0 or -1; 9: something else, such as a light that flickers.
        bar: whether an upright bar stands where the caption's should.
        gain: brightness of each frame, 1 under full light.
    """

    tone: Int[np.ndarray, " b"]
    texture: Int[np.ndarray, " b"]
    light: Int[np.ndarray, " b"]
    pan: Int[np.ndarray, " b"]
    bar: Bool[np.ndarray, " b"]
    gain: Float[np.ndarray, "b T"]


def look(
    video: Video,
    found: Detections,
    shift: Float[np.ndarray, "b T"],
    scenes: Scenes,
    fps: float,
) -> Scenery:
    """Reads the scenery of clips.

    Args:
        video: the clips, RGB in [0, 255].
        found: the detections in the clips.
        shift: the camera's shift of each frame in pixels, from `camera_shift`.
        scenes: the scenes that the captions describe; of them the bar's place is used,
            and where the walls stand.
        fps: frames per second.
    """
    grey = video[..., 1]
    hidden = _bar_columns(scenes, video.shape[3], found.side)
    levels, left = _fit(grey, found.objects, hidden, scenes, shift, found.side)
    wall, arena = levels[..., 0], levels[..., 0] + levels[..., 1]
    inside, outside = (np.maximum(np.median(x, 1), 1) for x in (arena, wall))
    ratio = np.log(inside / outside)
    known = np.log(TONE_LEVELS / WALL_LEVELS)
    tone = np.abs(ratio[:, None] - known).argmin(1)
    expected = np.stack([WALL_LEVELS[tone], TONE_LEVELS[tone]], -1)[:, None]
    gain = (np.stack([wall, arena], -1) * expected).sum(-1) / (expected**2).sum(-1)
    gain = np.maximum(gain, 1e-2)
    contrast = np.median(levels[..., 2:] / gain[..., None], 1) > TEXTURE_STEP / 2
    texture = np.where(contrast[:, 1], 2, np.where(contrast[:, 0], 1, 0))
    plain = np.median(left / gain, 1) < _MOST_LEFT
    bar = np.zeros(len(video), bool)
    for row in np.flatnonzero(scenes.bar):
        behind = grey[row][..., hidden[row]][~found.objects[row][..., hidden[row]]]
        if len(behind):
            known = np.array([BAR_LEVELS[tone[row]], TONE_LEVELS[tone[row]]])
            bar[row] = np.abs(behind.mean() / gain[row].mean() - known).argmin() == 0
    return Scenery(
        tone=np.where(plain, tone, -1),
        texture=np.where(plain, texture, -1),
        light=_light(gain, fps),
        pan=_pan(shift / found.side, fps),
        bar=bar,
        gain=gain,
    )


def camera_shift(
    video: Video, found: Detections, scenes: Scenes, fps: float
) -> Float[np.ndarray, "b T"]:
    """Pixels by which the grey scenery of each frame has moved right since the first.

    Where the caption tells of no pan, that of the last frame alone is measured.

    Args:
        video: the clips, RGB in [0, 255].
        found: the detections in the clips.
        scenes: the scenes that the captions describe.
        fps: frames per second.
    """
    shift = np.zeros(video.shape[:2])
    for rows, frames in (
        (np.flatnonzero(scenes.pan), slice(None)),
        (np.flatnonzero(scenes.pan == 0), slice(None, None, video.shape[1] - 1)),
    ):
        grey = video[rows, frames, :, :, 1]
        seen = ~found.objects[rows, frames]
        profile = (grey * seen).sum(2) / np.maximum(seen.sum(2), 1)
        shift[rows, frames] = _shift(profile, found.side, fps)
    return shift


def _shift(
    profile: Float[np.ndarray, "b T W"], side: int, fps: float
) -> Float[np.ndarray, "b T"]:
    """Shift of each frame's mean brightness of columns against that of the first.

    They are compared at every half pixel; a parabola through the best three refines the
    shift, and lines fitted to neighbouring frames smooth it.
    """
    profile -= profile.mean(-1, keepdims=True)
    profile /= profile.std(-1, keepdims=True) + 1e-3
    reach = round(2 * _PAN_SHARE * side)
    shifts = np.arange(-reach, reach + 1) / 2
    errors = _mismatch(profile, shifts)
    best = errors.argmin(-1).clip(1, len(shifts) - 2)
    left, middle, right = (
        np.take_along_axis(errors, best[..., None] + i, -1)[..., 0] for i in (-1, 0, 1)
    )
    bend = np.maximum(left - 2 * middle + right, 1e-6)
    refined = shifts[best] + 0.5 * np.clip(0.5 * (left - right) / bend, -0.5, 0.5)
    moved = errors[..., reach] - errors.min(-1, initial=np.inf) > _LEAST_GAIN
    window = min(round(_PAN_SECONDS * fps), profile.shape[1]) // 2 * 2 - 1
    refined = np.where(moved, refined, 0.0)
    if window < 3 or not len(profile):
        return refined
    # The import takes half a second, which every start of a training would wait for.
    from scipy.signal import savgol_filter

    return np.asarray(savgol_filter(refined, window, 1))


def _pan(shift: Float[np.ndarray, "b T"], fps: float) -> Int[np.ndarray, " b"]:
    """Whether the scenery ends up right (1), left (-1) or where it was (0); 9: none."""
    reached = min((shift.shape[1] - 1) / fps / RAMP_SECONDS, 1)
    ratio = shift[:, -1] / (2 * PAN_REACH * max(reached, 1e-3))
    kinds = np.array([0, 1, -1])
    apart = np.abs(ratio[:, None] - kinds)
    return np.where(apart.min(1) < _PAN_ERROR, kinds[apart.argmin(1)], 9)


def _mismatch(
    profile: Float[np.ndarray, "b T W"], shifts: Float[np.ndarray, " s"]
) -> Float[np.ndarray, "b T s"]:
    """Mean squared difference from the first frame's profile, shifted right."""
    width = profile.shape[-1]
    x = np.arange(width) - shifts[:, None]
    inside = (x >= 0) & (x <= width - 1)
    whole = x.astype(int).clip(0, width - 2)
    part, first = x - whole, profile[:, 0]
    moved = inside * (first[:, whole] * (1 - part) + first[:, whole + 1] * part)
    total = np.square(profile) @ inside.T + np.square(moved).sum(-1)[:, None]
    total -= 2 * profile @ moved.swapaxes(1, 2)
    return total / inside.sum(-1)


def _fit(
    grey: UInt8[np.ndarray, "b T H W"],
    objects: Bool[np.ndarray, "b T H W"],
    hidden: Bool[np.ndarray, "b W"],
    scenes: Scenes,
    shift: Float[np.ndarray, "b T"],
    side: int,
) -> tuple[Float[np.ndarray, "b T 4"], Float[np.ndarray, "b T"]]:
    """Fits the background's parts to each frame, by least squares.

    Returns:
        The levels of the wall, of the arena above it, of stripes and of a checkerboard;
        and the root of the mean squared error.
    """
    clips, frames, height, width = grey.shape
    step = max(side // _ENOUGH, 1)
    some = ..., slice(None, None, step), slice(None, None, step)
    grey = grey[some].astype(np.float32)
    seen = ~(objects[some] | hidden[:, None, None, some[-1]])
    pan = scenes.pan[:, None]
    offset = np.where(pan != 0, shift / side - PAN_REACH * pan, 0.0)
    products = np.empty((clips, frames, 4, 4), np.float32)
    sums = np.empty((clips, frames, 4), np.float32)
    squares = np.empty((clips, frames), np.float32)
    count = np.empty((clips, frames), np.float32)
    # All still clips have their walls in the same places; a few stay in the cache.
    still, panned = np.flatnonzero(scenes.pan == 0), np.flatnonzero(scenes.pan)
    groups = *np.split(still, range(_TOGETHER, len(still), _TOGETHER)), *panned[:, None]
    for rows in groups:
        if not len(rows):
            continue
        places = offset[rows[0], : None if scenes.pan[rows[0]] else 1]
        arena = scenes.arena[rows[0]]
        parts = background_parts(arena, places, height, width, side, step)
        basis = parts.reshape(4, len(places), -1)
        pairs = (basis[:, None] * basis).reshape(16, *basis.shape[1:])
        weight = seen[rows].reshape(len(rows), frames, -1).astype(np.float32)
        light = weight * grey[rows].reshape(weight.shape)
        products[rows] = _sums(weight, pairs).reshape(-1, frames, 4, 4)
        sums[rows] = _sums(light, basis)
        squares[rows] = np.square(light).sum(-1)
        count[rows] = weight.sum(-1)
    ridge = np.maximum(1e-3 * count, 1)[..., None, None] * np.eye(4)
    levels = np.linalg.solve(products + ridge, sums[..., None])[..., 0]
    error = squares - 2 * (levels * sums).sum(-1)
    error += np.einsum("btp,btpq,btq->bt", levels, products, levels)
    return levels, np.sqrt(np.maximum(error, 0) / np.maximum(count, 1))


def _sums(
    weight: Float[np.ndarray, "b T n"], basis: Float[np.ndarray, "p _ n"]
) -> Float[np.ndarray, "b T p"]:
    """Sums over the pixels of weights times a basis of one frame, or of each."""
    if basis.shape[1] == 1:
        return weight @ basis[:, 0].T
    return (weight[:, :, None] @ np.moveaxis(basis, 0, -1))[:, :, 0]


def _bar_columns(scenes: Scenes, width: int, side: int) -> Bool[np.ndarray, "b W"]:
    """The columns of pixels where the caption's bar stands."""
    left, right = np.rint(scenes.bar_span * side).astype(int).T[..., None]
    column = np.arange(width)
    return scenes.bar[:, None] & (left <= column) & (column < right)


def _light(gain: Float[np.ndarray, "b T"], fps: float) -> Int[np.ndarray, " b"]:
    """Whether the light brightens (1), dims (-1) or is steady (0); 9: none of these."""
    course = np.log(gain)
    kinds = np.array([0, 1, -1])
    known = np.log(light_course(kinds, np.arange(gain.shape[1]) / fps))
    apart = course[:, None] - known
    offset = apart.mean(-1)
    error = (apart - offset[..., None]).std(-1)
    total = np.hypot(error / _LIGHT_ERROR, offset / _BRIGHTNESS_ERROR)
    return np.where(total.min(1) < 1, kinds[total.argmin(1)], 9)
