"""Encoding and decoding of videos in pieces, in constant memory.

The same network and parameters as for a whole video: `VideoVAE.encode` and `decode`
continue from the collection "cache" (see `video_vae_layers`). A step function takes a
piece of the video and the cache that the piece before left, an empty one at the start;
it is compiled once for the first piece and once for all that follow.

Devices along `sharding.FRAMES` divide the frames of every piece but the first: at each
layer a device sends the next one its last frames, which is what that one looks back at.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Num

from jvdit.machine.compilation import jit
from jvdit.models.video_vae import VideoVAE
from jvdit.sharding import FRAMES, frame_ways

Cache = dict[str, Any]

DECODED_PIXELS = 1 << 21  # at once: a few GB of activations in a large autoencoder
# Frames before its own that a layer needs at the most, and so a device has.
LOOKS_BACK = 2


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
    frames = video.shape[1] // vae.temporal_compression
    return _advance(vae, "encode", frames, params, cache, video)


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
    return _advance(vae, "decode", latents.shape[1], params, cache, latents)


def _advance(
    vae: VideoVAE, method: str, frames: int, params: Any, cache: Cache, x: Any
) -> Any:
    """Takes a piece of so many latent frames, on as many devices as can."""

    def advance(params: Any, cache: Cache, x: Any) -> tuple[Any, Cache]:
        variables = {"params": params, "cache": cache} if cache else {"params": params}
        y, state = vae.apply(variables, x, method=method, mutable=["cache"])
        return y, dict(state["cache"])

    each, rest = divmod(frames, frame_ways())
    if frame_ways() == 1 or not cache or rest or each < LOOKS_BACK:
        return advance(params, cache, x)
    whole, places = PartitionSpec(), PartitionSpec(None, FRAMES)
    return jax.shard_map(
        advance,
        in_specs=(whole, whole, places),
        out_specs=(places, whole),
        axis_names={FRAMES},
    )(params, cache, x)


def encode_stream(
    vae: VideoVAE, params: Any, pieces: Iterable[Float[Array, "b _T H W 3"]]
) -> Iterator[tuple[Float[Array, "b _f h w c"], Float[Array, "b _f h w c"]]]:
    """Encodes a video piece by piece; see `encode_step`, and `split` for pieces."""
    return _stream(encode_step, vae, params, pieces)


def decode_stream(
    vae: VideoVAE, params: Any, pieces: Iterable[Float[Array, "b _f h w c"]]
) -> Iterator[Float[Array, "b _T H W 3"]]:
    """Decodes latents piece by piece, giving frames as soon as they are known."""
    return _stream(decode_step, vae, params, pieces)


def _stream(step: Any, vae: VideoVAE, params: Any, pieces: Iterable[Array]) -> Any:
    cache: Cache = {}
    for piece in pieces:
        made, cache = step(vae, params, piece, cache)
        yield made


def split(
    x: Num[Array | np.ndarray, "b f h w c"], frames: int
) -> Iterator[Num[Array | np.ndarray, "b _g h w c"]]:
    """Cuts a video, or latents, to its first frame and then pieces of `frames`."""
    yield x[:, :1]
    for start in range(1, x.shape[1], frames):
        yield x[:, start : start + frames]


def encode_normalized(
    vae: VideoVAE, params: Any, video: Float[np.ndarray, "T H W 3"]
) -> Float[np.ndarray, "f h w c"]:
    """A video in [-1, 1] to normalised latents, the mean of each, piece by piece."""
    frames, *_ = vae.latent_shape(*video.shape[:3])
    piece = at_once(1, frames - 1) * vae.temporal_compression
    pieces = split(_filled(jnp.asarray(video)[None], piece), piece)
    means = [np.asarray(mean) for mean, _ in encode_stream(vae, params, pieces)]
    mean = np.concatenate(means, axis=1)[:, :frames]
    return np.asarray(vae.normalize(jnp.asarray(mean)))[0]


def at_once(frames: int, later: int) -> int:
    """Latent frames of a piece.

    Args:
        frames: that one device can take at once.
        later: of the video, after its first.
    """
    ways = frame_ways()
    each = min(frames, -(-later // ways))
    return ways * max(each, 1 if ways == 1 else LOOKS_BACK)


def decoded_at_once(vae: VideoVAE, frames: int, height: int, width: int) -> int:
    """Latent frames of a piece to decode, of a video of so many latents."""
    pixels = height * width * vae.spatial_compression**2 * vae.temporal_compression
    return at_once(DECODED_PIXELS // pixels, frames - 1)


def _filled(x: Array, piece: int) -> Array:
    """Repeats the last frame until devices can divide every piece."""
    missing = -(x.shape[1] - 1) % piece if frame_ways() > 1 else 0
    return jnp.concatenate([x, jnp.repeat(x[:, -1:], missing, axis=1)], axis=1)


def decode_normalized(
    vae: VideoVAE, params: Any, latents: Float[np.ndarray, "b f h w c"]
) -> Iterator[Float[Array, "b _T H W 3"]]:
    """Normalised latents to pixels, in pieces as long as memory allows."""
    x = vae.denormalize(jnp.asarray(latents))
    clips, frames, height, width, _ = x.shape
    left, *_ = vae.video_shape(frames, height, width)
    piece = decoded_at_once(vae, frames, clips * height, width)
    for video in decode_stream(vae, params, split(_filled(x, piece), piece)):
        yield video[:, :left]
        left -= video.shape[1]
