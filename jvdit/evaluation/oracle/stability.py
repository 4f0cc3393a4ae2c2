"""Stability scores: flicker of the background, permanence of an object behind a bar.

Units are those of `world.scene`.
"""

import numpy as np

from jvdit.data.world.mechanics import simulate
from jvdit.data.world.scene import HALF_EXTENTS, Scenes
from jvdit.evaluation.oracle.detection import Detections, Video
from jvdit.evaluation.oracle.tracks import PerClip, Tracks

_LEAST_BACKGROUND = 0.05  # least share of the pixels that is background
_PIXEL = 1 / 64
_RUN = 12  # most frames of the approach that the path is fitted to
_LEAST_STEP = 0.2 / 64  # least step in a frame: slower objects never reach the bar
_AREA_ERROR, _GHOST = 0.25, 0.30  # shares of the object's area


def flicker(video: Video, found: Detections, scenes: Scenes) -> PerClip:
    """Mean absolute change of the background between frames; 1 is full brightness.

    Changes by a common factor are changes of the light, and don't count. A clip without
    a background is measured as a whole. NaN if the caption describes a moving camera.

    Args:
        video: RGB in [0, 255].
        found: the detections in the clips.
        scenes: the scenes that the captions describe.
    """
    mean = np.full(len(video), np.nan)
    for row in np.flatnonzero(scenes.pan == 0):
        light = video[row, ..., 1].reshape(video.shape[1], -1).astype(np.float32)
        seen = ~found.objects[row].reshape(light.shape)
        count = np.count_nonzero(seen[1:] & seen[:-1])
        if count < _LEAST_BACKGROUND * seen[1:].size:
            seen[:], count = True, seen[1:].size
        seen = seen.astype(np.float32)
        light *= seen
        now, before = light[1:] * seen[:-1], light[:-1] * seen[1:]
        gain = np.vecdot(now, before) / np.maximum(np.vecdot(before, before), 1.0)
        before *= gain[:, None]
        now -= before
        mean[row] = np.abs(now, out=now).sum() / count / 255
    return mean


def permanence(tracks: Tracks, scenes: Scenes, fps: float) -> PerClip:
    """Scores whether an object that passes behind a bar comes out as it should.

    Its path before the bar is extrapolated, with a bounce off the far wall if it
    reaches that. The score, in [0, 1], is the share of the frames after the bar in
    which the object is near that path and has its old size, times the share of the
    hidden frames in which it isn't seen. NaN without a bar, or if the clip ends before
    the object comes out; 0 if it is never seen though it should come out.
    """
    scores = np.full(len(scenes.ids), np.nan)
    seconds = (tracks.area.shape[1] - 1) / fps
    barred = np.flatnonzero(scenes.bar[tracks.clip])
    # The object may start elsewhere than the scene's, but as a rule it comes out too.
    motion = simulate(scenes.choose(tracks.clip[barred]), seconds)
    ends = motion.positions(np.array([seconds]))[:, 0, 0, 0]
    for i, end in zip(barred.tolist(), ends, strict=True):
        scores[tracks.clip[i]] = _passage(tracks, scenes, i, float(end))
    return scores


def _passage(tracks: Tracks, scenes: Scenes, i: int, end: float) -> float:
    clip, slot = tracks.clip[i], tracks.slot[i]
    forwards = 1.0 if scenes.direction[clip, slot] == 0 else -1.0
    near, far = scenes.bar_span[clip][:: int(forwards)]
    reach = HALF_EXTENTS[scenes.shape[clip, slot], 0, 0] * tracks.radius[i]
    x, y = tracks.whole[i].T
    lost = 0.0 if forwards * (end - far) > reach else np.nan
    early = np.flatnonzero(forwards * (x - near) < -(reach + 0.5 * _PIXEL))
    if not len(early):
        return lost
    run = early[: np.argmax(np.append(np.diff(early) > 1, True)) + 1][:_RUN]
    if len(run) < 2:
        return lost
    k = np.arange(len(x))
    path_x, path_y = (np.polyval(np.polyfit(run, v[run], 1), k) for v in (x, y))
    if forwards * (path_x[1] - path_x[0]) <= _LEAST_STEP:
        return lost
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
    good = error < 0.6 * tracks.radius[i] + _PIXEL
    good &= np.abs(area / usual - 1) < _AREA_ERROR
    ghost = area > _GHOST * usual
    return float(good[out].mean() * (1 - ghost[hidden].mean()))
