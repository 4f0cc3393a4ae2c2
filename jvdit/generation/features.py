"""Features of clips by a network of the user's own, for distances between sets."""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jvdit.models.video_vae import to_float
from jvdit.training.objectives.perceptual import given_features, read_features

Video = UInt8[np.ndarray, "T H W 3"]


def clip_features(
    folder: str | os.PathLike[str],
) -> Callable[[Sequence[Video]], Float[np.ndarray, "n f"]]:
    """Reads a network, and returns the function from clips to their features.

    Features are the mean over places and frames of the last scale, and that of its
    change from frame to frame.

    Args:
        folder: of safetensors, as `read_features` reads it.

    Raises:
        FileNotFoundError: there is no network.
        ValueError: it isn't of the kind that is read.
    """
    params = jax.device_put(read_features(folder))

    @jax.jit
    def one(video: Array) -> Array:
        last = given_features(params, to_float(video[None])[0])[-1].mean((1, 2))
        change = jnp.abs(jnp.diff(last, axis=0)).sum(0) / max(len(last) - 1, 1)
        return jnp.concatenate([last.mean(0), change])

    return lambda clips: np.stack([np.asarray(one(clip)) for clip in clips])
