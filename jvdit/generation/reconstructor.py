"""A finished autoencoder as a function: clips to what is left of them."""

import os

import jax
import numpy as np
from jaxtyping import UInt8

from jvdit.machine.compilation import jit
from jvdit.models.video_vae import to_float, to_uint8
from jvdit.weights.clip_encoder import ClipEncoder

Video = UInt8[np.ndarray, "T H W 3"]
Fitted = UInt8[np.ndarray, "t h w 3"]


class Reconstructor:
    """Encodes a clip and decodes the mean of its latents.

    Args:
        folder: of the autoencoder, see `ClipEncoder.load`.

    Raises:
        FileNotFoundError: there is no autoencoder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        network = ClipEncoder.load(folder).network
        self.vae, self._params = network.module, network.params
        self._reconstruct = jit(self._decoded)

    def __call__(self, video: Video) -> tuple[Fitted, Fitted]:
        """The part of a clip that fills latents, and what is left of it."""
        fitted = self.fit(video)
        return fitted, np.asarray(self._reconstruct(self._params, fitted[None])[0])

    def fit(self, video: Video) -> Fitted:
        """The clip without frames, rows and columns that fill no latent."""
        time, space = self.vae.temporal_compression, self.vae.spatial_compression
        frames, height, width = video.shape[:3]
        frames = 1 + (frames - 1) // time * time
        return video[:frames, : height // space * space, : width // space * space]

    def _decoded(self, params: object, video: jax.Array) -> jax.Array:
        return to_uint8(self.vae.apply({"params": params}, to_float(video))[0])
