"""The sound of a model of one's own clips, beside that of held-out clips.

Nobody knows there when something should sound, but a held-out clip's own sound tells.
So a sound that was made for its picture is compared with that one, as are sounds which
are wrong in a known way; and sounds that are made for captions, as a set.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jvdit.data.onsets import APART, onsets
from jvdit.data.spectrum import log_mel
from jvdit.evaluation import oracle, report
from jvdit.evaluation.distance import frechet_distance
from jvdit.evaluation.hearing import Sound, log_mel_distance
from jvdit.evaluation.measuring import LATE
from jvdit.evaluation.oracle.sound import match

MEANING = {
    "onsets_40ms": "F1 of its onsets and those of the clip's own sound within 40 ms",
    "loudness": "correlation of its level over time with that of the clip's own sound",
    "log_mel": "difference of the levels by time and band, dB",
}


class Sounds(NamedTuple):
    """The sounds of a held-out clip, all of one length.

    Attributes:
        real: its own.
        reconstructed: that, by the autoencoder.
        generated: for its caption, along with a picture.
        followed: for its picture; None: the model makes none for a picture.
        rate: samples per second.
    """

    real: Sound
    reconstructed: Sound
    generated: Sound
    followed: Sound | None
    rate: int


def agreement(clips: Sequence[Sounds]) -> dict[str, dict[str, report.Interval]]:
    """How sounds agree with those that the clips have themselves.

    Returns:
        By what is heard in the place of a clip's own sound, the mean and 95 % interval
        of each score in `MEANING`.
    """
    after = [*clips[1:], clips[0]]
    heard = {
        "made for its picture": [x.followed for x in clips],
        "reconstructed": [x.reconstructed for x in clips],
        "60 ms late": [_delayed(x.real, round(LATE * x.rate)) for x in clips],
        "another clip's": [
            np.resize(y.real, x.real.shape) for x, y in zip(clips, after, strict=True)
        ],
        "silence": [np.zeros_like(x.real) for x in clips],
    }
    found = {}
    for name, sounds in heard.items():
        each = [
            _scores(sound, clip.real, clip.rate)
            for sound, clip in zip(sounds, clips, strict=True)
            if sound is not None
        ]
        scores = {key: np.array([x[key] for x in each]) for key in MEANING}
        found[name] = oracle.summary(scores)
    return {name: scores for name, scores in found.items() if scores}


def sound_distances(clips: Sequence[Sounds]) -> dict[str, float]:
    """Fréchet distances of sets of sounds from the real ones.

    Features are the mean and the standard deviation of the level of each band over
    time, in dB, so no network has to be downloaded.

    Returns:
        Those of the "generated" and the "reconstructed" sounds; and where there are
        four clips, of one half of the "real" ones from the other half.
    """

    def features(name: str) -> Float[np.ndarray, "n f"]:
        levels = [log_mel(getattr(x, name), x.rate) for x in clips]
        return np.stack([np.concatenate([x.mean(0), x.std(0)]) for x in levels])

    real = features("real")
    found = {
        name: frechet_distance(features(name), real)
        for name in ("generated", "reconstructed")
    }
    if len(real) > 3:  # a half needs two clips
        found["real"] = frechet_distance(real[::2], real[1::2])
    return found


def _scores(sound: Sound, own: Sound, rate: int) -> Mapping[str, float]:
    """The scores of one sound; NaN where neither has anything to be compared."""
    times = [onsets(x.mean(1)[None], rate)[0] for x in (sound, own)]
    pairs = match(*times)
    hits = sum(abs(delay) <= APART for *_, delay in pairs)
    count = sum(map(len, times))
    levels = [log_mel(x, rate).mean(1) for x in (sound, own)]
    moving = all(np.ptp(x) > 0 for x in levels)
    return {
        "onsets_40ms": 2 * hits / count if count else np.nan,
        "loudness": float(np.corrcoef(*levels)[0, 1]) if moving else 0.0,
        "log_mel": log_mel_distance(sound, own, rate),
    }


def _delayed(sound: Sound, samples: int) -> Sound:
    return np.pad(sound, ((samples, 0), (0, 0)))[: len(sound)]
