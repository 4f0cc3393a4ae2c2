"""Sound scores: whether bounces are heard when they are seen, and sound right.

Times are in seconds. Dimension names: a audio samples, m bounces (see `tracks`).
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.fft import rfft

from jvdit.data.onsets import APART, ROOM, cut, onsets_in, padded_sound
from jvdit.data.world.impacts import bounce_tone, loudness
from jvdit.data.world.scene import MATERIALS, SIZES, Scenes
from jvdit.evaluation.oracle.tracks import Bounces, PerClip, Tracks, median_by

_IN_STEP = 0.75  # least F1 of a clip whose sound is in sync with its video
_PEAK = 0.012  # time in which a sound is at its loudest
_LOUDER = 1.15  # ratio of the peaks of two bounces that are compared
_CENTS = np.arange(-300, 301, 25)
_LAGS = np.arange(-0.5, 0.505, 0.01)


def match(
    heard: Float[np.ndarray, " n"], seen: Float[np.ndarray, " m"]
) -> list[tuple[int, int, float]]:
    """Pairs sounds with bounces greedily, nearest first; each is in at most one pair.

    Args:
        heard: times of the sounds in seconds.
        seen: times of the bounces in seconds.

    Returns:
        For each pair the index of the sound, that of the bounce, and the sound's delay.
    """
    delay = heard[:, None] - seen
    pairs, left, right = [], set(), set()
    for place in np.argsort(np.abs(delay), axis=None):
        i, j = divmod(int(place), len(seen))
        if i not in left and j not in right:
            left.add(i)
            right.add(j)
            pairs.append((i, j, float(delay[i, j])))
    return pairs


def synchrony(
    audio: Float[np.ndarray, "b a"],
    rate: int,
    tracks: Tracks,
    bounces: Bounces,
    scenes: Scenes,
    fps: float,
) -> dict[str, PerClip]:
    """Scores the synchrony of sounds with bounces.

    Of sound that was made for a given video it tells how the sound obeys, and of video
    that was made for a given sound how the video does.

    Args:
        audio: mono sound in [-1, 1].
        rate: audio samples per second.
        tracks: the tracks of the captioned objects.
        bounces: their bounces.
        scenes: the scenes that the captions describe.
        fps: frames per second of the video.

    Returns:
        For each clip: "sync_40ms" and "sync_frame", the F1 score of matching sounds
        with bounces within 40 ms and within a frame; "sync", whether the former is at
        least 0.75; "stray", sounds without a bounce and bounces without a sound, in a
        second; "delay", the median seconds from a bounce to the nearest sound; "lag",
        the seconds by which all sounds are shifted; "material", the share of matched
        sounds that fit the material and size of what bounced; "pitch", the median
        difference from the pitch of that, in cents; "loudness", the share of pairs of
        bounces of which the harder is heard louder. They are NaN if a bar may hide
        bounces, and where there is nothing to measure: no bounce is seen, and for the
        first four none is heard either.
    """
    names = ("sync_40ms", "sync_frame", "sync", "stray", "delay", "lag", "material")
    scores = {name: np.full(len(audio), np.nan) for name in names}
    span = 1.25 / fps, (tracks.area.shape[1] - 2.25) / fps
    padded = padded_sound(audio, rate)
    hard = np.linalg.norm(bounces.after - bounces.before, axis=-1)
    of_clip = tracks.clip[bounces.track]
    bangs: list[Bang] = []
    for clip, heard in enumerate(onsets_in(padded, rate)):
        if scenes.bar[clip]:
            continue
        seen, by, loud = _events(bounces, np.flatnonzero(of_clip == clip), hard)
        found, pairs = _agreement(heard, seen, span, 1 / fps)
        for name, value in found.items():
            scores[name][clip] = value
        slots = [[tracks.slot[k] for k in bouncing] for bouncing in by]
        bangs += [Bang(clip, heard[i], slots[j], loud[j]) for i, j in pairs]
    return scores | _timbre(padded, rate, bangs, scenes, scores["material"])


def _agreement(
    heard: np.ndarray, seen: np.ndarray, span: tuple[float, float], frame: float
) -> tuple[dict[str, float], list[tuple[int, int]]]:
    """Scores of one clip, by the sounds and bounces between two times.

    Returns:
        The scores that there are, and the pairs of a sound and a bounce that are less
        than a frame apart.
    """
    first, last = span
    inside = [(first <= t) & (t <= last) for t in (heard, seen)]
    events = int(inside[0].sum() + inside[1].sum())
    if not events:
        return {}, []
    scores, pairs = {}, match(heard, seen)
    for name, most in (("sync_40ms", APART), ("sync_frame", frame)):
        good = [(i, j) for i, j, delay in pairs if abs(delay) <= most]
        hits = sum(int(inside[0][i]) + int(inside[1][j]) for i, j in good)
        scores[name] = hits / events
    scores["sync"] = float(scores["sync_40ms"] >= _IN_STEP)
    scores["stray"] = (events - hits) / (last - first)
    if not inside[1].any():
        return scores, []
    scores["delay"], scores["lag"] = _delays(heard, seen[inside[1]])
    scores["material"] = 0.0
    return scores, [(i, j) for i, j in good if inside[1][j]]


class Bang(NamedTuple):
    """A bounce that is seen and heard.

    Attributes:
        clip: index of its clip.
        time: when it is heard, in seconds.
        slots: the objects that bounce, slots of the clip's scene.
        loud: how loud it should be.
    """

    clip: int
    time: float
    slots: list[int]
    loud: float


_KINDS = np.arange(len(MATERIALS) * len(SIZES)).reshape(len(MATERIALS), len(SIZES))


def _events(
    bounces: Bounces, chosen: np.ndarray, hard: np.ndarray
) -> tuple[np.ndarray, list[set[int]], np.ndarray]:
    """The times of a clip's bounces, what bounces at each, and how loud each should be.

    Two objects that bounce off each other are one event.
    """
    times: list[float] = []
    tracks: list[set[int]] = []
    impacts: list[float] = []
    for i in chosen[np.argsort(bounces.time[chosen])].tolist():
        track = int(bounces.track[i])
        if not times or bounces.time[i] - times[-1] >= APART:
            times.append(float(bounces.time[i]))
            tracks.append(set())
            impacts.append(0.0)
        impacts[-1] += hard[i] * (track not in tracks[-1])
        tracks[-1].add(track)
    # A collision sounds twice, each time more softly.
    share = np.array([0.9 if len(x) > 1 else 1.0 for x in tracks])
    return np.array(times), tracks, share * loudness(np.array(impacts))


def _delays(heard: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """The median time from a bounce to the nearest sound, and the best common shift."""
    if not len(heard):
        return 0.5, np.nan
    apart = heard[:, None] - seen
    delay = float(np.median(np.abs(apart).min(0)))
    fit = np.exp(-0.5 * ((apart[..., None] - _LAGS) / 0.02) ** 2).sum((0, 1))
    return delay, float(abs(_LAGS[np.argmax(fit - 1e-3 * np.abs(_LAGS))]))


def _concordance(loud: np.ndarray, peaks: np.ndarray) -> float:
    """The share of pairs of bounces of which the louder has the higher peak."""
    right = [
        (peaks[i] > peaks[j]) == (loud[i] > loud[j])
        for i, j in itertools.combinations(range(len(peaks)), 2)
        if max(loud[i], loud[j]) > _LOUDER * min(loud[i], loud[j])
    ]
    return float(np.mean(right)) if right else np.nan


def _timbre(
    padded: np.ndarray,
    rate: int,
    bangs: list[Bang],
    scenes: Scenes,
    material: PerClip,
) -> dict[str, PerClip]:
    """Whether bangs sound like what bounces: "material", "pitch", and "loudness".

    `material` is what the first is where there are none.
    """
    clips = len(padded)
    clip = np.array([bang.clip for bang in bangs], int)
    start = np.rint([bang.time * rate for bang in bangs]).astype(int)
    told = np.zeros((len(bangs), _KINDS.size), bool)
    for i, (at, _, slots, _) in enumerate(bangs):
        told[i, _KINDS[scenes.material[at, slots], scenes.size[at, slots]]] = True
    samples = round(ROOM * rate)
    before = cut(padded, clip, start - samples, samples, rate)[:, ::-1]
    after = cut(padded, clip, start, samples, rate)
    old, new = (np.abs(rfft(x * _fade(samples))) for x in (before, after))
    tones = _tones(rate, samples)
    likeness = np.maximum(new - old, 0) @ tones.reshape(-1, tones.shape[-1]).T
    likeness = likeness.reshape(len(bangs), *tones.shape[:2])
    kind = likeness[..., len(_CENTS) // 2].argmax(1)
    cents = np.where(told, np.abs(_CENTS)[likeness.argmax(2)], np.inf).min(1)
    fits = np.bincount(clip, told[np.arange(len(bangs)), kind], clips)
    count = np.bincount(clip, minlength=clips)
    peaks = np.abs(cut(padded, clip, start, round(_PEAK * rate), rate)).max(1)
    loud = np.array([bang.loud for bang in bangs])
    parts = (np.split(x, np.cumsum(count)[:-1]) for x in (loud, peaks))
    return {
        "material": np.where(count, fits / np.maximum(count, 1), material),
        "pitch": median_by(clip, cents, clips),
        "loudness": np.array([_concordance(*x) for x in zip(*parts, strict=True)]),
    }


@functools.cache
def _fade(samples: int) -> np.ndarray:
    return np.hanning(2 * samples)[samples:].astype(np.float32)


@functools.cache
def _tones(rate: int, samples: int) -> Float[np.ndarray, "kinds cents n"]:
    """Normalised spectra of the world's tones, by kind, higher or lower by cents."""
    spectra = []
    for material, size in np.ndindex(_KINDS.shape):
        for cents in _CENTS:
            # Played at the rate, it is as much higher as it was written at a lower one.
            written = round(rate * 2 ** (-cents / 1200))
            tone = bounce_tone(material, size, written)[:samples]
            tone = np.pad(tone, (0, samples - len(tone)))
            spectra.append(np.abs(rfft(tone * _fade(samples))))
    spectra = np.stack(spectra)
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    return spectra.reshape(_KINDS.size, len(_CENTS), -1)
