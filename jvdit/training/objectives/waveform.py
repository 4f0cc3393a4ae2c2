"""The training objective of the audio autoencoder."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jvdit.models.audio_vae import AudioVAE
from jvdit.training.objectives.autoencoding import narrow, posterior_sample
from jvdit.training.step import Batch, Metrics

_FLOOR = 1e-3  # of an amplitude, below which levels don't matter: -60 dB


@dataclasses.dataclass(frozen=True)
class AudioVAEObjective:
    """Trains an audio autoencoder to reconstruct its input.

    The loss of a sound is L1 of its samples + L1 of its spectra + L1 of their
    logarithms (both over windows of several lengths, arXiv:1910.11480, Eq. 6) + KL
    divergence of the posterior from a unit normal (mean over latents).

    Attributes:
        vae: the autoencoder.
        l1, spectrum, kl: weights of the terms; the logarithms have weight 1.
        windows: samples of each length of the windows.
    """

    vae: AudioVAE
    l1: float = 20.0
    spectrum: float = 20.0
    kl: float = 1e-3
    windows: Sequence[int] = (64, 256, 1024, 2048)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters: {"vae": ...}."""
        audio = jnp.zeros((1, *batch["audio"].shape[1:]))
        return {"vae": narrow(self.vae.init(key, audio)["params"])}

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws a random key for each sound."""
        return {**batch, "key": jax.random.split(key, len(batch["audio"]))}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How many sounds of the batch could be read."""
        return batch["valid"].sum().astype(jnp.float32)

    def loss(
        self, params: Any, batch: Batch, *, ema: Any = None, step: Any = 0
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum over sounds of the loss, and of its terms."""
        apply: Any = partial(self.vae.apply, {"params": params["vae"]})
        audio = batch["audio"]
        mean, logvar = apply(audio, method="encode")
        latents = posterior_sample(batch["key"], mean, logvar)
        decoded = apply(latents, method="decode")[:, : audio.shape[1]]
        valid = batch["valid"].astype(jnp.float32)
        spectrum, log_spectrum = self._spectral(decoded, audio)
        terms = {
            "l1": jnp.abs(decoded - audio).mean((1, 2)),
            "spectrum": spectrum,
            "log_spectrum": log_spectrum,
            "kl": 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean((1, 2)),
        }
        total = terms["log_spectrum"]
        for name in ("l1", "spectrum", "kl"):
            total = total + getattr(self, name) * terms[name]
        metrics: Metrics = {k: (valid * v).sum() for k, v in terms.items()}
        return (valid * total).sum(), metrics

    def _spectral(self, decoded: Array, audio: Array) -> tuple[Array, Array]:
        """Distances of the spectra, and of their logarithms, of each sound."""
        linear, log = jnp.zeros(len(audio)), jnp.zeros(len(audio))
        # The channels of a stereo sound are sounds; one transform takes all of them.
        both = jnp.concatenate([decoded, audio])
        for window in self.windows:
            level = spectra(both, window)
            ours, theirs = jnp.split(level, 2)
            linear += jnp.abs(ours - theirs).mean((1, 2, 3))
            ours, theirs = jnp.split(jnp.log(level + _FLOOR), 2)
            log += jnp.abs(ours - theirs).mean((1, 2, 3))
        return linear / len(self.windows), log / len(self.windows)

    def reconstruct(self, params: Any, audio: Array) -> Array:
        """Encodes sounds and decodes the posterior's mean."""
        return self.vae.apply({"params": params["vae"]}, audio)[0]


def spectra(audio: Float[Array, "b a e"], window: int) -> Float[Array, "b n f e"]:
    """Amplitudes by time and frequency, in windows that overlap by three quarters.

    A sine of amplitude 1 has 1, where it fits a frequency.

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
    spectrum = jnp.fft.rfft(jnp.concatenate(pieces, axis=2) * fade, axis=2)
    # A root has no gradient at 0, which silence is.
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.sqrt(power + 1e-12)
