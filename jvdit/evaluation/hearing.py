"""Reconstruction quality of sound against a reference: SI-SDR and log-mel distance."""

import numpy as np
from jaxtyping import Float

from jvdit.data.spectrum import log_mel

Sound = Float[np.ndarray, "a e"]


def si_sdr(audio: Sound, wanted: Sound) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (arXiv:1811.02508, Eq. 5).

    At most 100; NaN if the wanted sound is silent.
    """
    x, y = (s.astype(np.float64) - s.mean(0, dtype=np.float64) for s in (audio, wanted))
    power = (y * y).sum()
    if power == 0:
        return float("nan")
    target = (x * y).sum() / power * y
    error = ((x - target) ** 2).sum()
    signal = (target**2).sum()
    return float(10 * np.log10(max(signal, 1e-30) / max(error, signal * 1e-10, 1e-30)))


def log_mel_distance(audio: Sound, wanted: Sound, rate: int) -> float:
    """Mean absolute difference of the levels by time and band, in dB."""
    return float(np.abs(log_mel(audio, rate) - log_mel(wanted, rate)).mean())
