"""The oracle: scores clips of the procedural world by what they show and sound like.

No network judges, and the simulator isn't consulted: a clip is measured, and compared
with the scene that its caption describes. Real clips don't score 1 everywhere, so
compare a score with that of real clips of the same scenes.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jvdit.data.world.scene import Scenes
from jvdit.evaluation.oracle.adherence import Reading, adherence, read
from jvdit.evaluation.oracle.detection import Detections, Video, detect
from jvdit.evaluation.oracle.physics import physics
from jvdit.evaluation.oracle.scenery import camera_shift, look
from jvdit.evaluation.oracle.sound import synchrony
from jvdit.evaluation.oracle.stability import flicker, permanence
from jvdit.evaluation.oracle.tracks import (
    Bounces,
    PerClip,
    Tracks,
    falling,
    find_bounces,
    follow,
)

_LEAST_MATERIAL = 0.5  # of a clip's sounds that are of what bounces
_AT_ONCE = 64  # clips that are scored at once, to bound memory

Scores = dict[str, PerClip]


@dataclasses.dataclass(frozen=True)
class Column:
    """How to read a score.

    Attributes:
        section: heading that it is listed under.
        meaning: its meaning in a few words.
        best: the value of a perfect clip; None: higher is better.
    """

    section: str
    meaning: str
    best: float | None = None


COLUMNS = {
    "all": Column("prompt", "everything that the prompt says is right"),
    "count": Column("prompt", "number of objects"),
    "color": Column("prompt", "objects found by their color"),
    "shape": Column("prompt", "and of the right shape"),
    "size": Column("prompt", "and of the right size"),
    "direction": Column("prompt", "and setting out as told"),
    "speed": Column("prompt", "and as fast as told"),
    "lasting": Column("prompt", "the same objects all the time"),
    "background": Column("prompt", "tone and texture"),
    "light": Column("prompt", "steady, or changing as told"),
    "camera": Column("prompt", "standing, or panning as told"),
    "bar": Column("prompt", "a bar where one is told"),
    "falling": Column("prompt", "gravity where it is told"),
    "binding": Column("prompt", "objects with another's attribute", 0.0),
    "physics": Column("physics", "all of the physics is right"),
    "foretold": Column("physics", "positions that the laws foretell"),
    "pace": Column("physics", "speed at the end over the beginning's", 1.0),
    "restitution": Column("physics", "speed after over before a wall", 1.0),
    "gravity": Column("physics", "acceleration over the world's", 1.0),
    "teleport": Column("physics", "objects suddenly elsewhere", 0.0),
    "moving": Column("physics", "objects that move"),
    "permanence": Column("stability", "comes out from behind a bar"),
    "flicker": Column("stability", "change of the background", 0.0),
    "sync": Column("sound", "in step with the picture"),
    "sync_40ms": Column("sound", "bounces and sounds within 40 ms"),
    "sync_frame": Column("sound", "bounces and sounds within a frame"),
    "delay": Column("sound", "seconds from a bounce to a sound", 0.0),
    "lag": Column("sound", "seconds that all sounds are shifted", 0.0),
    "stray": Column("sound", "sounds or bounces alone, in a second", 0.0),
    "material": Column("sound", "sounds like what bounces"),
    "pitch": Column("sound", "cents off the pitch of that", 0.0),
    "loudness": Column("sound", "harder bounces are louder"),
}


@dataclasses.dataclass(frozen=True)
class Observed:
    """What is measured of clips, before it is judged.

    Attributes:
        found: the detections in each frame.
        tracks: the tracks of the captioned objects.
        gravity: downward acceleration of each, 0 where the caption has no gravity.
        bounces: their bounces.
        reading: what the captions tell, as the clips show it.
    """

    found: Detections
    tracks: Tracks
    gravity: Float[np.ndarray, " n"]
    bounces: Bounces
    reading: Reading


def score(
    video: Video,
    scenes: Scenes,
    fps: float,
    audio: Float[np.ndarray, "b a"] | None = None,
    audio_rate: int = 16_000,
) -> Scores:
    """Scores clips against the scenes that their captions describe.

    Args:
        video: RGB in [0, 255].
        scenes: the scene of each clip; its positions and velocities are not used.
        fps: frames per second.
        audio: mono sound in [-1, 1]; None: the scores of section "sound" are left out.
        audio_rate: samples per second.

    Returns:
        For each score in `COLUMNS` its value for each clip; NaN where there is nothing
        to measure.

    Raises:
        ValueError: there are not as many clips as scenes, or they have fewer than 4
            frames.
    """
    if len(video) != len(scenes.ids):
        raise ValueError(
            f"{len(video)} clips are to be scored against {len(scenes.ids)} scenes; "
            "give the scene of each clip."
        )
    check_frames(video.shape[1])
    parts = []
    for start in range(0, len(video), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        sound = None if audio is None else audio[some]
        clips, those = video[some], scenes.choose(some)
        seen = observe(clips, those, fps)
        parts.append(judge(seen, clips, those, fps, sound, audio_rate))
    return joined(parts)


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> Scores:
    """The scores of several batches, one after another."""
    return {name: np.concatenate([x[name] for x in parts]) for name in parts[0]}


def check_frames(frames: int) -> None:
    """Raises a ValueError if clips have too few frames to be scored."""
    if frames < 4:
        raise ValueError(
            f"clips of {frames} frames don't show how anything moves; score clips of "
            "at least 4."
        )


def observe(video: Video, scenes: Scenes, fps: float) -> Observed:
    """Measures what clips show of the scenes that their captions describe."""
    found = detect(video)
    shift = camera_shift(video, found, scenes, fps)
    tracks = follow(found, shift, scenes)
    told = scenes.gravity[tracks.clip]
    bounces = find_bounces(tracks, told * falling(tracks, fps), fps)
    pull = falling(tracks, fps, bounces)
    gravity = told * pull
    bounces = find_bounces(tracks, gravity, fps)
    scenery = look(video, found, shift, scenes, fps)
    reading = read(found, tracks, bounces, pull, scenery, scenes, fps)
    return Observed(found, tracks, gravity, bounces, reading)


def judge(
    seen: Observed,
    video: Video,
    scenes: Scenes,
    fps: float,
    audio: Float[np.ndarray, "b a"] | None = None,
    rate: int = 16_000,
) -> Scores:
    """Scores clips of which all that counts has been measured; see `score`."""
    tracks, bounces = seen.tracks, seen.bounces
    scores = adherence(seen.reading, tracks, scenes)
    side = seen.found.side
    scores |= physics(tracks, bounces, seen.gravity, scenes, fps, side)
    scores["permanence"] = permanence(tracks, scenes, fps)
    scores["flicker"] = flicker(video, seen.found, scenes)
    if audio is not None:
        scores |= listen(seen, scenes, fps, audio, rate)
        scores["all"] *= ~(scores["material"] < _LEAST_MATERIAL)
    return {name: scores[name] for name in COLUMNS if name in scores}


def listen(
    seen: Observed,
    scenes: Scenes,
    fps: float,
    audio: Float[np.ndarray, "b a"],
    rate: int,
) -> Scores:
    """Scores the sound of clips of which all that is seen has been measured."""
    return synchrony(audio, rate, seen.tracks, seen.bounces, scenes, fps)


def mean_and_interval(
    values: PerClip, resamples: int = 1000
) -> tuple[float, float, float]:
    """The mean of the values that aren't NaN, and its 95 % confidence interval.

    Args:
        values: a score of each clip.
        resamples: how many bootstrap samples the interval is computed from.

    Returns:
        Mean, lower and upper end; all NaN if no value is finite.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def summary(scores: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """The mean and 95 % confidence interval of each score that some clip has."""
    return {k: mean_and_interval(v) for k, v in scores.items() if np.isfinite(v).any()}


def means(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each score over the clips that have it; NaN if none has."""
    return {name: mean_and_interval(x, 1)[0] for name, x in scores.items()}
