"""The short-time Fourier transform of waveforms."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float


def stft(audio: Float[Array, "b a e"], window: int) -> Complex[Array, "b n f e"]:
    """Spectra by time and frequency, in Hann windows that overlap by three quarters.

    A sine of amplitude 1 has magnitude 1, where it fits a frequency.

    Args:
        audio: samples; zeros are added at the end to fill the last window.
        window: samples of a window, a multiple of 4.
    """
    hop = window // 4
    fade = np.hanning(window + 1)[:-1].astype(np.float32)
    fade = jnp.asarray(2 * fade / fade.sum()).reshape(1, 1, -1, 1)
    count = max(-(-audio.shape[1] // hop), 4)
    audio = jnp.pad(audio, ((0, 0), (0, count * hop - audio.shape[1]), (0, 0)))
    hops = audio.reshape(len(audio), count, hop, -1)
    pieces = [hops[:, i : count - 3 + i] for i in range(4)]
    return jnp.fft.rfft(jnp.concatenate(pieces, axis=2) * fade, axis=2)
