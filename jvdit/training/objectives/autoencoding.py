"""The training objective of the video autoencoder, and what that of sound shares."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from jvdit.models.video_vae import VideoVAE, to_float, to_uint8
from jvdit.training.step import Batch, Metrics


def random_features(
    frames: Float[Array, "n H W 3"], channels: tuple[int, ...] = (16, 32, 64)
) -> list[Float[Array, "n h w c"]]:
    """Features of a fixed, random convolutional network at several scales.

    Random filters already tell blur and ringing from sharp edges (arXiv:1801.03924
    finds random networks better than pixel distances), need no download, and are the
    same everywhere, because their seed is a constant.

    Args:
        frames: images with pixels in [-1, 1].
        channels: width of each scale; every scale but the first halves the resolution.
    """
    features, x = [], frames
    for i, width in enumerate(channels):
        key = jax.random.fold_in(jax.random.key(20_221), i)
        kernel = jax.random.normal(key, (3, 3, x.shape[-1], width))
        kernel = kernel - kernel.mean((0, 1), keepdims=True) * 0.5
        kernel = kernel / jnp.sqrt(9 * x.shape[-1])
        strides = (1, 1) if i == 0 else (2, 2)
        form = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), strides, "SAME", dimension_numbers=form
        )
        x = jax.nn.leaky_relu(x, 0.2) * 1.4
        features.append(x)
    return features


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """Trains a video autoencoder to reconstruct its input.

    The loss of a video is L1 + squared error + perceptual distance on random features +
    KL divergence of the posterior from a unit normal (arXiv:1312.6114, App. B; mean
    over latents) + L1 of the differences between frames, which penalises flicker.

    Attributes:
        vae: the autoencoder.
        mse, perceptual, kl, temporal: weights of the terms; L1 has weight 1. The
            squared error matters early, when L1 alone would settle for the median of a
            flat background; later L1 outweighs it.
    """

    vae: VideoVAE
    mse: float = 5.0
    perceptual: float = 0.5
    kl: float = 3e-4
    temporal: float = 0.5

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters: {"vae": ...}."""
        video = jnp.zeros((1, *batch["video"].shape[1:]))
        return {"vae": narrow(self.vae.init(key, video)["params"])}

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
        apply: Any = partial(self.vae.apply, {"params": params["vae"]})
        video = to_float(batch["video"])
        mean, logvar = apply(video, method="encode")
        latents = posterior_sample(batch["key"], mean, logvar)
        decoded = apply(latents, method="decode")
        valid = batch["valid"].astype(jnp.float32)
        terms = {
            "l1": _per_video(jnp.abs(decoded - video)),
            "mse": _per_video((decoded - video) ** 2),
            "perceptual": _perceptual(decoded, video),
            "kl": 0.5 * _per_video(mean**2 + jnp.exp(logvar) - 1 - logvar),
            "temporal": _temporal(decoded, video),
        }
        total = terms["l1"]
        for name in ("mse", "perceptual", "kl", "temporal"):
            total = total + getattr(self, name) * terms[name]
        metrics: Metrics = {k: (valid * v).sum() for k, v in terms.items()}
        metrics["psnr"] = (valid * psnr(decoded, video)).sum()
        return (valid * total).sum(), metrics

    def reconstruct(self, params: Any, video: Array) -> Array:
        """Encodes videos and decodes the posterior's mean; uint8 to uint8."""
        return to_uint8(self.vae.apply({"params": params["vae"]}, to_float(video))[0])


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


def _perceptual(decoded, video):
    b, T = video.shape[:2]
    both = jnp.concatenate([decoded, video]).reshape(2 * b * T, *video.shape[2:])
    distance = jnp.zeros((b,))
    for feature in random_features(both):
        ours, theirs = jnp.split(feature, 2)
        distance += jnp.abs(ours - theirs).reshape(b, -1).mean(1)
    return distance / 3


def _temporal(decoded, video):
    if video.shape[1] == 1:
        return jnp.zeros(len(video))
    return _per_video(jnp.abs(jnp.diff(decoded, axis=1) - jnp.diff(video, axis=1)))
