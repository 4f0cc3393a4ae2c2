"""Onsets: when something begins to sound.

Times are in seconds. Dimension names: a audio samples, p those of a padded sound.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy.fft import rfft
from numpy.lib.stride_tricks import sliding_window_view

APART = 0.040  # sounds that are closer count as one
ROOM = 0.064  # silence before and after a padded sound
Padded = Float[np.ndarray, "b p"]
_WINDOW, _HOP = 0.016, 0.004
_RISE = 0.003  # time over which the attack of a sound is measured


def onsets(audio: Float[np.ndarray, "b a"], rate: int) -> list[Float[np.ndarray, " n"]]:
    """Finds sound onsets: peaks of spectral flux, moved to the steepest rise nearby.

    Args:
        audio: mono sound in [-1, 1].
        rate: samples per second.

    Returns:
        The times of the onsets in each clip, in seconds.
    """
    return onsets_in(padded_sound(audio, rate), rate)


def padded_sound(audio: Float[np.ndarray, "b a"], rate: int) -> Padded:
    """Sound between two stretches of silence, from which every window can be cut."""
    room = round(ROOM * rate)
    padded = np.zeros((len(audio), audio.shape[1] + 2 * room), np.float32)
    padded[:, room:-room] = audio
    return padded


def cut(
    padded: np.ndarray, clip: np.ndarray, start: np.ndarray, samples: int, rate: int
) -> Float[np.ndarray, "n samples"]:
    """Windows of clips, each from a sample on."""
    return sliding_window_view(padded, samples, 1)[clip, start + round(ROOM * rate)]


def onsets_in(padded: Padded, rate: int) -> list[Float[np.ndarray, " n"]]:
    """The onsets, as of `onsets`, in sounds that `padded_sound` has padded."""
    window, hop = round(_WINDOW * rate), round(_HOP * rate)
    skipped = round(ROOM * rate) - window
    places = [_flux_peaks(x[skipped:-skipped], window, hop, rate) for x in padded]
    ends = np.cumsum([len(x) for x in places])
    clip = np.searchsorted(ends, np.arange(ends[-1]), "right")
    around = (np.concatenate(places) + 1) * hop - window // 2
    return np.split(_attacks(padded, clip, around, rate), ends[:-1])


def _flux_peaks(
    audio: np.ndarray, window: int, hop: int, rate: int
) -> Int[np.ndarray, " n"]:
    """The windows, one each hop, at which a sound begins, in order."""
    pieces = sliding_window_view(audio, window)[::hop]
    level = np.abs(rfft(pieces * np.hanning(window).astype(np.float32)))
    level *= 50
    np.log1p(level, out=level)
    rise = level[3:] - level[:-3]
    np.maximum(rise, 0, out=rise)
    flux = rise @ np.full(rise.shape[1], 1 / rise.shape[1], np.float32)
    least = max(np.median(flux) + 0.12 * flux.max(), 0.10)
    inner = flux[1:-1]
    peak = (inner > least) & (inner >= flux[:-2]) & (inner > flux[2:])
    places = np.flatnonzero(peak) + 1
    kept: list[int] = []
    for place in places[np.argsort(-flux[places], kind="stable")].tolist():
        if all(abs(place - other) * hop > APART * rate for other in kept):
            kept.append(place)
    return np.sort(np.array(kept, int))


def _attacks(
    padded: np.ndarray, clip: np.ndarray, around: np.ndarray, rate: int
) -> Float[np.ndarray, " n"]:
    """The time, in seconds, of the steepest rise of loudness near each place."""
    span, reach = round(_RISE * rate), round(_WINDOW * rate)
    side = span + reach
    pieces = np.abs(cut(padded, clip, around - side, 2 * side, rate))
    total = np.zeros((len(clip), 2 * side + 1))
    np.cumsum(pieces, 1, np.float64, total[:, 1:])
    rise = total[:, 2 * span :] - 2 * total[:, span:-span] + total[:, : -2 * span]
    candidates = around[:, None] + np.arange(-reach, reach + 1)
    last = padded.shape[1] - 2 * round(ROOM * rate) - 1
    rise[(candidates < 0) | (candidates > last)] = -np.inf
    return candidates[np.arange(len(clip)), rise.argmax(1)] / rate
