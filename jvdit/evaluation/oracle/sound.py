"""Sound scores: whether bounces are heard when they are seen, and sound right.

Times are in seconds. Dimension names: a audio samples, m bounces (see `tracks`).
"""

import functools
import itertools

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import rfft

from jvdit.data.world.render import bounce_tone, loudness
from jvdit.data.world.scene import MATERIALS, SIZES, Scenes
from jvdit.evaluation.oracle.tracks import Bounces, Tracks

_WINDOW, _HOP = 0.016, 0.004
_RISE = 0.003  # time over which the attack of a sound is measured
_APART = 0.040  # closer sounds count as one; also the strict tolerance
_IN_STEP = 0.75  # least F1 of a clip whose sound is in sync with its video
_SPECTRUM = 0.064  # length of the part of a sound that tells materials apart
_PEAK = 0.012  # time in which a sound is at its loudest
_LOUDER = 1.15  # ratio of the peaks of two bounces that are compared
_CENTS = np.arange(-300, 301, 25)
_LAGS = np.arange(-0.5, 0.505, 0.01)


def onsets(audio: Float[np.ndarray, "b a"], rate: int) -> list[Float[np.ndarray, " n"]]:
    """Finds sound onsets: peaks of spectral flux, moved to the steepest rise nearby.

    Args:
        audio: mono sound in [-1, 1].
        rate: samples per second.

    Returns:
        The times of the onsets in each clip, in seconds.
    """
    return [_onsets(clip.astype(np.float32), rate) for clip in audio]


def _onsets(audio: Float[np.ndarray, " a"], rate: int) -> Float[np.ndarray, " n"]:
    window, hop = round(_WINDOW * rate), round(_HOP * rate)
    pieces = sliding_window_view(np.pad(audio, window), window)[::hop]
    level = np.abs(rfft(pieces * np.hanning(window).astype(np.float32)))
    np.log1p(50 * level, out=level)
    flux = np.maximum(level[3:] - level[:-3], 0).mean(-1)
    least = max(np.median(flux) + 0.12 * flux.max(), 0.10)
    inner = flux[1:-1]
    peak = (inner > least) & (inner >= flux[:-2]) & (inner > flux[2:])
    places = np.flatnonzero(peak) + 1
    kept: list[int] = []
    for place in places[np.argsort(-flux[places], kind="stable")]:
        if all(abs(place - other) * hop > _APART * rate for other in kept):
            kept.append(int(place))
    around = (np.sort(np.array(kept, int)) + 1) * hop - window // 2
    return _attacks(np.abs(audio), around, rate)


def _attacks(loudness: np.ndarray, around: np.ndarray, rate: int) -> np.ndarray:
    """The time, in seconds, of the steepest rise of loudness near each place."""
    span, reach = round(_RISE * rate), round(_WINDOW * rate)
    total = np.pad(np.cumsum(loudness, dtype=np.float64), (span + 1, span), "edge")
    total[: span + 1] = 0
    candidates = around[:, None] + np.arange(-reach, reach + 1)
    candidates = candidates.clip(0, len(loudness) - 1)
    at = candidates + span  # index of the sum of all samples before the candidate
    rise = total[at + span] - 2 * total[at] + total[at - span]
    best = rise.argmax(1) if len(around) else np.zeros(0, int)
    return candidates[np.arange(len(around)), best] / rate


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
) -> dict[str, Float[np.ndarray, " b"]]:
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
    names = ("sync_40ms", "sync_frame", "sync", "stray", "delay", "lag")
    names += ("material", "pitch", "loudness")
    scores = {name: np.full(len(audio), np.nan) for name in names}
    first, last = 1.25 / fps, (tracks.area.shape[1] - 2.25) / fps
    for clip, heard in enumerate(onsets(audio, rate)):
        if scenes.bar[clip]:
            continue
        seen, by, loud = _events(bounces, tracks.clip[bounces.track] == clip)
        inside = [(first <= t) & (t <= last) for t in (heard, seen)]
        events = int(inside[0].sum() + inside[1].sum())
        if not events:
            continue
        pairs = match(heard, seen)
        for name, most in (("sync_40ms", _APART), ("sync_frame", 1 / fps)):
            good = [(i, j) for i, j, delay in pairs if abs(delay) <= most]
            hits = sum(int(inside[0][i]) + int(inside[1][j]) for i, j in good)
            scores[name][clip] = hits / events
        scores["sync"][clip] = scores["sync_40ms"][clip] >= _IN_STEP
        scores["stray"][clip] = (events - hits) / (last - first)
        if not inside[1].any():
            continue
        scores["delay"][clip], scores["lag"][clip] = _delays(heard, seen[inside[1]])
        close = [(i, j) for i, j in good if inside[1][j]]
        fits, cents, peaks = [0.0], [], []
        for i, j in close:
            objects = [(tracks.clip[k], tracks.slot[k]) for k in by[j]]
            kinds = {int(_KINDS[scenes.material[o], scenes.size[o]]) for o in objects}
            fit, off = _sounds_like(audio[clip], rate, heard[i], kinds)
            fits.append(fit)
            cents.append(off)
            start = round(heard[i] * rate)
            peaks.append(
                float(np.abs(audio[clip, start : start + round(_PEAK * rate)]).max())
            )
        scores["material"][clip] = np.mean(fits[1:] or fits)
        if close:
            scores["pitch"][clip] = np.median(cents)
            scores["loudness"][clip] = _concordance(loud[[j for _, j in close]], peaks)
    return scores


_KINDS = np.arange(len(MATERIALS) * len(SIZES)).reshape(len(MATERIALS), len(SIZES))


def _events(
    bounces: Bounces, chosen: np.ndarray
) -> tuple[np.ndarray, list[set[int]], np.ndarray]:
    """The times of a clip's bounces, what bounces at each, and how loud each should be.

    Two objects that bounce off each other are one event.
    """
    times: list[float] = []
    tracks: list[set[int]] = []
    impacts: list[float] = []
    order = np.flatnonzero(chosen)
    hard = np.linalg.norm(bounces.after - bounces.before, axis=-1)
    for i in order[np.argsort(bounces.time[order])]:
        track = int(bounces.track[i])
        if not times or bounces.time[i] - times[-1] >= _APART:
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


def _concordance(loud: np.ndarray, peaks: list[float]) -> float:
    """The share of pairs of bounces of which the louder has the higher peak."""
    right = [
        (peaks[i] > peaks[j]) == (loud[i] > loud[j])
        for i, j in itertools.combinations(range(len(peaks)), 2)
        if max(loud[i], loud[j]) > _LOUDER * min(loud[i], loud[j])
    ]
    return float(np.mean(right)) if right else np.nan


def _sounds_like(
    audio: np.ndarray, rate: int, time: float, kinds: set[int]
) -> tuple[float, float]:
    """Whether the tone nearest to a sound is of one of the kinds, and its cents off."""
    samples, start = round(_SPECTRUM * rate), round(time * rate)
    fade = _fade(samples)

    def spectrum(piece: np.ndarray) -> np.ndarray:
        return np.abs(rfft(np.pad(piece, (0, samples - len(piece))) * fade))

    before = audio[max(start - samples, 0) : start][::-1]
    new = spectrum(audio[start : start + samples]) - spectrum(before)
    likeness = _tones(rate, samples) @ np.maximum(new, 0)
    fit = float(likeness[:, len(_CENTS) // 2].argmax() in kinds)
    cents = [abs(_CENTS[likeness[kind].argmax()]) for kind in kinds]
    return fit, float(min(cents))


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
