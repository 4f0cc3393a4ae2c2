"""Stability scores: flicker of the background, permanence of an object behind a bar.

Units are those of `world.scene`.
"""

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.world.scene import HALF_EXTENTS, Scenes
from jvdit.evaluation.tracks import Tracks

_GREY = 20  # most chroma of the background
_LEAST_BACKGROUND = 0.05  # least share of the pixels that is background
_PIXEL = 1 / 64
_RUN = 12  # most frames of the approach that the path is fitted to
_LEAST_STEP = 0.2 / 64  # least step in a frame: slower objects never reach the bar
_AREA_ERROR, _GHOST = 0.25, 0.30  # shares of the object's area


def flicker(
    video: UInt8[np.ndarray, "b T H W 3"], scenes: Scenes
) -> Float[np.ndarray, " b"]:
    """Mean absolute change of the background between frames; 1 is full brightness.

    Changes by a common factor are changes of the light, and don't count. A clip without
    a background is measured as a whole. NaN if the caption describes a moving camera.

    Args:
        video: RGB in [0, 255].
        scenes: the scenes that the captions describe.
    """
    high = np.maximum(np.maximum(video[..., 0], video[..., 1]), video[..., 2])
    low = np.minimum(np.minimum(video[..., 0], video[..., 1]), video[..., 2])
    grey = (high - low < _GREY).reshape(*video.shape[:2], -1)
    light = high.reshape(grey.shape).astype(np.float32)
    both = grey[:, 1:] & grey[:, :-1]
    both |= (both.mean((1, 2)) < _LEAST_BACKGROUND)[:, None, None]
    now, before = light[:, 1:] * both, light[:, :-1] * both
    gain = (now * before).sum(-1) / np.maximum((before**2).sum(-1), 1.0)
    change = np.abs(now - gain[..., None] * before).sum((1, 2))
    mean = change / np.maximum(both.sum((1, 2)), 1) / 255
    return np.where(scenes.pan == 0, mean, np.nan)


def permanence(tracks: Tracks, scenes: Scenes) -> Float[np.ndarray, " b"]:
    """Scores whether an object that passes behind a bar comes out as it should.

    Its path before the bar is extrapolated, with a bounce off the far wall if it
    reaches that. The score, in [0, 1], is the share of the frames after the bar in
    which the object is near that path and has its old size, times the share of the
    hidden frames in which it isn't seen. NaN without a bar, or if the clip ends before
    the object comes out.
    """
    scores = np.full(len(scenes.ids), np.nan)
    for i in np.flatnonzero(scenes.bar[tracks.clip]).tolist():
        scores[tracks.clip[i]] = _passage(tracks, scenes, i)
    return scores


def _passage(tracks: Tracks, scenes: Scenes, i: int) -> float:
    clip, slot = tracks.clip[i], tracks.slot[i]
    forwards = 1.0 if scenes.direction[clip, slot] == 0 else -1.0
    near, far = scenes.bar_span[clip][:: int(forwards)]
    reach = HALF_EXTENTS[scenes.shape[clip, slot], 0, 0] * tracks.radius[i]
    x, y = tracks.whole[i].T
    early = np.flatnonzero(forwards * (x - near) < -(reach + 0.5 * _PIXEL))
    if not len(early):
        return 0.0
    run = early[: np.argmax(np.append(np.diff(early) > 1, True)) + 1][:_RUN]
    if len(run) < 2:
        return 0.0
    k = np.arange(len(x))
    path_x, path_y = (np.polyval(np.polyfit(run, v[run], 1), k) for v in (x, y))
    if forwards * (path_x[1] - path_x[0]) <= _LEAST_STEP:
        return 0.0
    wall = scenes.arena[clip, 1 if forwards > 0 else 0, 0] - forwards * reach
    path_x = np.where(forwards * (path_x - wall) > 0, 2 * wall - path_x, path_x)
    later = k > run[-1]
    out = later & (forwards * (path_x - far) > reach + 0.5 * _PIXEL)
    hidden = later & (forwards * (path_x - near) > reach)
    hidden &= forwards * (far - path_x) > reach
    if not (out.any() and hidden.any()):
        return np.nan
    usual = np.nanmedian(tracks.area[i, run])
    error = np.hypot(x - path_x, y - path_y)
    area = np.nan_to_num(tracks.area[i])
    good = (error < 0.6 * tracks.radius[i] + _PIXEL) & (
        np.abs(area / usual - 1) < _AREA_ERROR
    )
    ghost = area > _GHOST * usual
    return float(good[out].mean() * (1 - ghost[hidden].mean()))
