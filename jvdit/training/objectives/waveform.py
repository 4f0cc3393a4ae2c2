"""The training objective of the audio autoencoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jvdit.models.audio_vae import AudioVAE
from jvdit.models.stft import stft
from jvdit.training.objectives.autoencoding import initialised, posterior_sample
from jvdit.training.objectives.critic import Critic, reconstruction_loss
from jvdit.training.step import Batch, Metrics

_FLOOR = 1e-3  # of an amplitude, below which levels don't matter: -60 dB


@dataclasses.dataclass(frozen=True)
class AudioVAEObjective:
    """Trains an audio autoencoder to reconstruct its input.

    The loss of a sound is L1 of its samples + L1 of its spectra + L1 of their
    logarithms (both over windows of several lengths, arXiv:1910.11480, Eq. 6) + KL
    divergence of the posterior from a unit normal (mean over latents); and what a
    critic adds to it.

    Attributes:
        vae: the autoencoder.
        l1, spectrum, kl: weights of the terms; the logarithms have weight 1.
        windows: samples of each length of the windows.
        critic: a critic that is trained along; None: there is none.
    """

    vae: AudioVAE
    l1: float = 20.0
    spectrum: float = 20.0
    kl: float = 1e-3
    windows: Sequence[int] = (64, 256, 1024, 2048)
    critic: Critic | None = None

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters: "vae", and "critic" if there is one."""
        audio = jnp.zeros((1, *batch["audio"].shape[1:]))
        return initialised(self.vae, self.critic, key, audio)

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
        audio, given = batch["audio"], {"params": params["vae"]}
        moments: Any = self.vae.apply(given, audio, method="encode")
        mean, logvar = moments
        latents = posterior_sample(batch["key"], mean, logvar)
        valid = batch["valid"].astype(jnp.float32)

        def decode(vae: Any) -> Array:
            decoded: Any = self.vae.apply({"params": vae}, latents, method="decode")
            return decoded[:, : audio.shape[1]]

        def errors(decoded: Array) -> tuple[Array, Metrics]:
            l1 = jnp.abs(decoded - audio).mean((1, 2))
            spectrum, log_spectrum = self._spectral(decoded, audio)
            total = log_spectrum + self.l1 * l1 + self.spectrum * spectrum
            terms = {"l1": l1, "spectrum": spectrum, "log_spectrum": log_spectrum}
            metrics: Metrics = {k: (valid * v).sum() for k, v in terms.items()}
            return (valid * total).sum(), metrics

        loss, metrics = reconstruction_loss(
            self.critic, params, decode, errors, audio, valid
        )
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean((1, 2))
        metrics["kl"] = (valid * kl).sum()
        return loss + self.kl * metrics["kl"], metrics

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
    """Amplitudes by time and frequency: magnitudes of `stft`."""
    spectrum = stft(audio, window)
    # A root has no gradient at 0, which silence is.
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.sqrt(power + 1e-12)
