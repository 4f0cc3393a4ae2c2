"""Spectra of sound, to be measured and to be looked at."""

import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, UInt8
from numpy.fft import rfft
from numpy.lib.stride_tricks import sliding_window_view

_WINDOW, _HOP = 0.032, 0.008  # seconds
_BANDS = 80
_FLOOR = 1e-5  # of an amplitude: -100 dB
_MARK = (220, 40, 40)
_LOWEST = 40.0  # Hz, of the bands


def log_mel(audio: Float[np.ndarray, "a e"], rate: int) -> Float[np.ndarray, "n bands"]:
    """Levels in dB by time and band, of the mean of a sound's channels.

    Bands are as wide as they are heard (the mel scale); a sine of amplitude 1 has about
    0 dB. Frames lie 8 ms apart.

    Args:
        audio: samples in [-1, 1].
        rate: samples per second.
    """
    window, hop = round(_WINDOW * rate), round(_HOP * rate)
    mono = np.pad(audio.mean(1), window // 2)
    pieces = sliding_window_view(mono, window)[::hop]
    fade = np.hanning(window + 2)[1:-1]
    power = np.square(np.abs(rfft(pieces * (2 * fade / fade.sum()))))
    return 10 * np.log10(power @ _bands(window, rate) + _FLOOR**2)


@functools.cache
def _bands(window: int, rate: int) -> Float[np.ndarray, "f bands"]:
    """Triangles over frequencies, evenly spaced in mel, each with sum 1."""

    def mel(frequency):
        return 2595 * np.log10(1 + np.asarray(frequency) / 700)

    edges = np.linspace(mel(_LOWEST), mel(rate / 2), _BANDS + 2)
    at = mel(np.arange(window // 2 + 1) * rate / window)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    # A band that is narrower than a bin is that of the nearest one.
    wide = np.diff(at[:, 0]).max() / 2
    low, high = np.minimum(low, middle - wide), np.maximum(high, middle + wide)
    rise, fall = (at - low) / (middle - low), (high - at) / (high - middle)
    return np.clip(np.minimum(rise, fall), 0, None)


def spectrogram(
    audio: Float[np.ndarray, "a e"],
    rate: int,
    height: int = 96,
    width: int | None = None,
    marks: Iterable[float] = (),
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of a sound: time to the right, pitch upwards, dark is loud.

    Args:
        audio: samples in [-1, 1].
        rate: samples per second.
        height: pixels.
        width: pixels; None: 100 for a second.
        marks: seconds at which a line is drawn, such as where sounds set in.
    """
    level = log_mel(audio, rate)
    width = width or max(1, round(100 * len(audio) / rate))
    rows = np.linspace(level.shape[1] - 1, 0, height).round().astype(int)
    columns = np.linspace(0, len(level) - 1, width).round().astype(int)
    shade = np.clip((level[columns][:, rows].T + 90) / 80, 0, 1)
    light = np.array([255, 255, 250]) * (1 - shade[..., None])
    drawn = (light + np.array([30, 20, 70]) * shade[..., None]).astype(np.uint8)
    for second in marks:
        at = min(int(second * rate / len(audio) * width), width - 1)
        drawn[: height // 4, at] = _MARK
    return drawn
