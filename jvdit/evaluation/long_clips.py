"""What becomes of long clips: scores window by window, and what drifts.

Units are those of `world.scene`, dimension names those of `tracks`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from jvdit.data.world.scene import GRAVITY, PAN_REACH, Scenes
from jvdit.evaluation import oracle
from jvdit.evaluation.oracle.detection import Video
from jvdit.evaluation.oracle.tracks import Tracks, largest_by

WINDOW = 2.0  # seconds
_OF_WINDOWS = ("count", "lasting", "color", "shape", "size", "physics", "foretold")


def windows(video: Video, scenes: Scenes, fps: float) -> list[oracle.Scores]:
    """Scores of each window of two seconds, by itself.

    Scores of how objects set out, and of light and camera, which come to rest within
    the first window, aren't among them.

    Args:
        video: clips, RGB in [0, 255]; frames that don't fill a window are left out.
        scenes: the scenes that the captions describe.
        fps: frames per second.
    """
    length = round(WINDOW * fps)
    found = []
    for start in range(0, video.shape[1] - length + 1, length):
        scores = oracle.score(
            video[:, start : start + length], _at_rest(scenes) if start else scenes, fps
        )
        found.append({name: scores[name] for name in _OF_WINDOWS})
    return found


def drifts(
    video: Video,
    scenes: Scenes,
    fps: float,
    audio: Float[np.ndarray, "b a"] | None = None,
    rate: int = 16_000,
) -> oracle.Scores:
    """What drifts in a second: "energy", "radius", "brightness" and "loudness".

    All are slopes of logarithms, 0 at best: energy that of all objects of a clip,
    radius the largest of its objects, brightness that of the background. "identity" is
    the share of frames that show the captioned objects and no others.

    Args:
        video: clips, RGB in [0, 255].
        scenes: the scenes that the captions describe.
        fps: frames per second.
        audio: mono sound in [-1, 1]; None: without its loudness.
        rate: audio samples per second.
    """
    seen = oracle.observe(video, scenes, fps)
    tracks, count = seen.tracks, len(scenes.ids)
    radius = _slope(np.log(np.sqrt(tracks.area / np.pi)), fps)
    found = {
        "energy": _slope(np.log(_energy(tracks, scenes, fps)), fps),
        "radius": largest_by(tracks.clip, np.abs(radius), count),
        "brightness": _slope(np.log(seen.reading.scenery.gain), fps),
        "identity": seen.reading.lasting,
    }
    if audio is not None:
        pieces = audio[:, : audio.shape[1] // rate * rate].reshape(count, -1, rate)
        loud = np.log(np.sqrt(np.square(pieces).mean(-1)) + 1e-4)
        found["loudness"] = _slope(loud, 1.0)
    return found


def _energy(tracks: Tracks, scenes: Scenes, fps: float) -> Float[np.ndarray, "b t"]:
    """Energy of all objects of each clip in half-second pieces; NaN if one is unseen.

    A step over a bounce is shortened by it, so the faster half of a piece counts.
    """
    length = max(round(0.5 * fps), 2)
    step = np.diff(tracks.centre, axis=1) * fps
    pieces = step.shape[1] // length
    middle = (tracks.centre[:, 1:, 1] + tracks.centre[:, :-1, 1]) / 2
    # Height over the floor, so that all energies are positive.
    floor = scenes.arena[tracks.clip, 1, 1]
    pull = GRAVITY * scenes.gravity[tracks.clip, None]
    each = np.square(step).sum(-1) / 2 + pull * (floor[:, None] - middle)
    each = (tracks.radius[:, None] ** 2 * each)[:, : pieces * length]
    each = np.quantile(each.reshape(len(each), pieces, length), 0.75, axis=-1)
    total = np.zeros((len(scenes.ids), pieces))
    np.add.at(total, tracks.clip, each)
    return np.maximum(total, 1e-12)


def _slope(values: Float[np.ndarray, "n t"], rate: float) -> Float[np.ndarray, " n"]:
    """The slope per second of a line fitted to each row; NaN aren't seen."""
    seen = np.isfinite(values)
    count = np.maximum(seen.sum(1, keepdims=True), 1)
    time = np.broadcast_to(np.arange(values.shape[1]) / rate, values.shape)
    time = np.where(seen, time - (seen * time).sum(1, keepdims=True) / count, 0.0)
    square = np.square(time).sum(1)
    slope = (time * np.where(seen, values, 0.0)).sum(1) / np.maximum(square, 1e-9)
    return np.where(square > 0, slope, np.nan)


def _at_rest(scenes: Scenes) -> Scenes:
    """The scenes once the camera has come to rest, and where the walls are then."""
    shift = np.zeros((len(scenes.ids), 1, 2))
    shift[:, 0, 0] = PAN_REACH * scenes.pan
    still = np.zeros_like(scenes.pan)
    return dataclasses.replace(scenes, pan=still, arena=scenes.arena + shift)
