"""Encoding and decoding of videos in pieces, in constant memory.

The same network and parameters as for a whole video: `VideoVAE.encode` and `decode`
continue from the collection "cache" (see `video_vae_layers`). A step function takes a
piece of the video and the cache that the piece before left, an empty one at the start;
it is compiled once for the first piece and once for all that follow.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jvdit.compilation import jit
from jvdit.models.video_vae import VideoVAE

Cache = dict[str, Any]

DECODED_PIXELS = 1 << 21  # at once: a few GB of activations in a large autoencoder


@functools.partial(jit, static_argnames="vae", donate_argnames="cache")
def encode_step(
    vae: VideoVAE, params: Any, video: Float[Array, "b T H W 3"], cache: Cache
) -> tuple[tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]], Cache]:
    """Encodes the next frames of a video.

    Args:
        vae: the autoencoder.
        params: its parameters.
        video: pixels in [-1, 1]; frames are 1 + `temporal_compression` k in the first
            piece, and `temporal_compression` k in those that follow.
        cache: what the step before returned (its memory is reused); {} to begin.

    Returns:
        (mean, logvar) of the latents of these frames, and the cache.
    """
    variables = {"params": params, "cache": cache} if cache else {"params": params}
    moments, state = vae.apply(variables, video, method="encode", mutable=["cache"])
    return moments, dict(state["cache"])


@functools.partial(jit, static_argnames="vae", donate_argnames="cache")
def decode_step(
    vae: VideoVAE, params: Any, latents: Float[Array, "b f h w c"], cache: Cache
) -> tuple[Float[Array, "b T H W 3"], Cache]:
    """Decodes the next latent frames of a video, any number of them.

    Args:
        vae: the autoencoder.
        params: its parameters.
        latents: latents, not normalised.
        cache: what the step before returned (its memory is reused); {} to begin.

    Returns:
        `temporal_compression` frames for each latent frame, one for the first of the
        video, and the cache.
    """
    variables = {"params": params, "cache": cache} if cache else {"params": params}
    video, state = vae.apply(variables, latents, method="decode", mutable=["cache"])
    return video, dict(state["cache"])


def encode_stream(
    vae: VideoVAE, params: Any, pieces: Iterable[Float[Array, "b _T H W 3"]]
) -> Iterator[tuple[Float[Array, "b _f h w c"], Float[Array, "b _f h w c"]]]:
    """Encodes a video piece by piece; see `encode_step`, and `split` for pieces."""
    cache: Cache = {}
    for piece in pieces:
        moments, cache = encode_step(vae, params, piece, cache)
        yield moments


def decode_stream(
    vae: VideoVAE, params: Any, pieces: Iterable[Float[Array, "b _f h w c"]]
) -> Iterator[Float[Array, "b _T H W 3"]]:
    """Decodes latents piece by piece, giving frames as soon as they are known."""
    cache: Cache = {}
    for piece in pieces:
        video, cache = decode_step(vae, params, piece, cache)
        yield video


def split(
    x: Float[Array, "b f h w c"], frames: int
) -> Iterator[Float[Array, "b _g h w c"]]:
    """Cuts a video, or latents, to its first frame and then pieces of `frames`."""
    yield x[:, :1]
    for start in range(1, x.shape[1], frames):
        yield x[:, start : start + frames]


def encode_normalized(
    vae: VideoVAE, params: Any, video: Float[np.ndarray, "T H W 3"]
) -> Float[np.ndarray, "f h w c"]:
    """A video in [-1, 1] to normalised latents, the mean of each, piece by piece."""
    pieces = split(jnp.asarray(video)[None], vae.temporal_compression)
    means = [np.asarray(mean) for mean, _ in encode_stream(vae, params, pieces)]
    return np.asarray(vae.normalize(jnp.asarray(np.concatenate(means, axis=1))))[0]


def decoded_at_once(vae: VideoVAE, latents: int) -> int:
    """Latent frames of that many latents to decode as one piece."""
    pixels = latents * vae.spatial_compression**2 * vae.temporal_compression
    return max(DECODED_PIXELS // pixels, 1)


def decode_normalized(
    vae: VideoVAE, params: Any, latents: Float[np.ndarray, "b f h w c"]
) -> Iterator[Float[Array, "b _T H W 3"]]:
    """Normalised latents to pixels, in pieces as long as memory allows."""
    x = vae.denormalize(jnp.asarray(latents))
    piece = decoded_at_once(vae, x.shape[0] * x.shape[2] * x.shape[3])
    return decode_stream(vae, params, split(x, piece))


def decode_scan(
    vae: VideoVAE, params: Any, latents: Float[Array, "b f h w c"]
) -> Float[Array, "b T H W 3"]:
    """Decodes a whole video as a loop over latent frames, to be called under jit.

    Activations take the memory of one latent frame, whatever the length.
    """
    first, cache = decode_step(vae, params, latents[:, :1], {})
    if latents.shape[1] == 1:
        return first

    def step(cache: Cache, latent: Array) -> tuple[Cache, Array]:
        video, cache = decode_step(vae, params, latent[:, None], cache)
        return cache, video

    _, later = jax.lax.scan(step, cache, jnp.moveaxis(latents[:, 1:], 1, 0))
    later = jnp.moveaxis(later, 0, 1)
    later = later.reshape(later.shape[0], -1, *later.shape[3:])
    return jnp.concatenate([first, later], axis=1)
