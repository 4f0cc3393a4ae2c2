"""The training objective of the video autoencoder, and what that of sound shares."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from jvdit.models.video_vae import VideoVAE, to_float, to_uint8
from jvdit.training.objectives.critic import Critic, reconstruction_loss
from jvdit.training.objectives.perceptual import given_features, random_features
from jvdit.training.step import Batch, Metrics


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """Trains a video autoencoder to reconstruct its input.

    The loss of a video is L1 + squared error + perceptual distance + KL divergence of
    the posterior from a unit normal (arXiv:1312.6114, App. B; mean over latents) + L1
    of the differences between frames, which penalises flicker; and what a critic adds
    to it. The perceptual distance is taken on random features, or on those of a network
    among the parameters, "features" (see `given_features`).

    Attributes:
        vae: the autoencoder.
        mse, perceptual, kl, temporal: weights of the terms; L1 has weight 1. The
            squared error matters early, when L1 alone would settle for the median of a
            flat background; later L1 outweighs it.
        critic: a critic that is trained along; None: there is none.
    """

    vae: VideoVAE
    mse: float = 5.0
    perceptual: float = 0.5
    kl: float = 3e-4
    temporal: float = 0.5
    critic: Critic | None = None

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters: "vae", and "critic" if there is one."""
        video = jnp.zeros((1, *batch["video"].shape[1:]))
        return initialised(self.vae, self.critic, key, video)

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws a random key for each video."""
        return {**batch, "key": jax.random.split(key, len(batch["video"]))}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How many videos of the batch could be read."""
        return batch["valid"].sum().astype(jnp.float32)

    def loss(
        self, params: Any, batch: Batch, *, ema: Any = None, step: Any = 0
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum over videos of the loss, of its terms, and of the PSNR in dB."""
        video = to_float(batch["video"])
        given = {"params": params["vae"]}
        moments: Any = self.vae.apply(given, video, method="encode")
        mean, logvar = moments
        latents = posterior_sample(batch["key"], mean, logvar)
        valid = batch["valid"].astype(jnp.float32)

        def decode(vae: Any) -> Any:
            return self.vae.apply({"params": vae}, latents, method="decode")

        def errors(decoded: Array) -> tuple[Array, Metrics]:
            terms = {
                "l1": _per_video(jnp.abs(decoded - video)),
                "mse": _per_video((decoded - video) ** 2),
                "perceptual": _perceptual(decoded, video, params.get("features")),
                "temporal": _temporal(decoded, video),
            }
            total = terms["l1"]
            for name in ("mse", "perceptual", "temporal"):
                total = total + getattr(self, name) * terms[name]
            terms["psnr"] = psnr(decoded, video)
            metrics: Metrics = {k: (valid * v).sum() for k, v in terms.items()}
            return (valid * total).sum(), metrics

        loss, metrics = reconstruction_loss(
            self.critic, params, decode, errors, video, valid
        )
        kl = 0.5 * _per_video(mean**2 + jnp.exp(logvar) - 1 - logvar)
        metrics["kl"] = (valid * kl).sum()
        return loss + self.kl * metrics["kl"], metrics

    def reconstruct(self, params: Any, video: Array) -> Array:
        """Encodes videos and decodes the posterior's mean; uint8 to uint8."""
        return to_uint8(self.vae.apply({"params": params["vae"]}, to_float(video))[0])


def initialised(vae: Any, critic: Critic | None, key: Any, clip: Array) -> Any:
    """Initialises an autoencoder, and a critic if there is one, on blank clips."""
    params = {"vae": narrow(vae.init(key, clip)["params"])}
    return params if critic is None else {**params, "critic": critic.init(key, clip)}


def narrow(params: Any) -> Any:
    """Makes the posterior of a new autoencoder narrow.

    The decoder then learns from the means first.
    """
    bias = params["quant_conv"]["bias"]
    params["quant_conv"]["bias"] = bias.at[len(bias) // 2 :].set(-6.0)
    return params


def posterior_sample(
    keys: Key[Array, " b"], mean: Float[Array, "b ..."], logvar: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """Draws the latents of each clip with a key of its own."""
    draw = jax.vmap(lambda k, m: jax.random.normal(k, m.shape))
    return mean + jnp.exp(0.5 * logvar) * draw(keys, mean)


def psnr(a: Float[Array, "b T H W 3"], b: Float[Array, "b T H W 3"]) -> Array:
    """Peak signal-to-noise ratio of each video in dB; pixels in [-1, 1]."""
    error = jnp.mean((jnp.clip(a, -1, 1) - b) ** 2, axis=(1, 2, 3, 4))
    return 10 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def _per_video(x):
    return x.mean((1, 2, 3, 4))


def _perceptual(decoded, video, network):
    b, T = video.shape[:2]
    both = jnp.concatenate([decoded, video]).reshape(2 * b * T, *video.shape[2:])
    distance = jnp.zeros((b,))
    features = (
        random_features(both) if network is None else given_features(network, both)
    )
    for feature in features:
        ours, theirs = jnp.split(feature, 2)
        distance += jnp.abs(ours - theirs).reshape(b, -1).mean(1)
    return distance / len(features)


def _temporal(decoded, video):
    if video.shape[1] == 1:
        return jnp.zeros(len(video))
    return _per_video(jnp.abs(jnp.diff(decoded, axis=1) - jnp.diff(video, axis=1)))
