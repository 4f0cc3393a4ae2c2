"""Autoencoder reconstructions: encode a clip or a sound, and decode it again."""

import os

import jax
import numpy as np
from jaxtyping import Float, UInt8

from jvdit.machine.compilation import jit
from jvdit.models.audio_vae_chunked import decode_sound, encode_sound
from jvdit.models.video_vae import to_float, to_uint8
from jvdit.weights.bundle import Network
from jvdit.weights.encoders import load_sound_network

Video = UInt8[np.ndarray, "T H W 3"]
Fitted = UInt8[np.ndarray, "t h w 3"]
Sound = Float[np.ndarray, "a e"]


class Reconstructor:
    """Encodes a clip and decodes the mean of its latents.

    Args:
        network: the autoencoder, such as that of a `ClipEncoder`.
    """

    def __init__(self, network: Network):
        self.vae, self._params = network.module, network.params
        self._reconstruct = jit(self._decoded)

    def __call__(self, video: Video) -> tuple[Fitted, Fitted]:
        """The clip, cropped to whole latents, and its reconstruction."""
        fitted = self.fit(video)
        return fitted, np.asarray(self._reconstruct(self._params, fitted[None])[0])

    def fit(self, video: Video, unit: int = 0) -> Fitted:
        """Crops a clip to the frames, rows and columns that fill whole latents.

        Args:
            video: the clip.
            unit: height and width become multiples of this, in pixels; 0: of a latent.
        """
        time, space = self.vae.temporal_compression, self.vae.spatial_compression
        space = unit or space
        frames, height, width = video.shape[:3]
        frames = 1 + (frames - 1) // time * time
        return video[:frames, : height // space * space, : width // space * space]

    def _decoded(self, params: object, video: jax.Array) -> jax.Array:
        return to_uint8(self.vae.apply({"params": params}, to_float(video))[0])


class SoundReconstructor:
    """Encodes a sound of any length and decodes the mean of its latents.

    Args:
        folder: the autoencoder's training workdir, its `model` folder, its weights, or
            the folder of the released KVAE-Audio.

    Raises:
        FileNotFoundError: there is no autoencoder.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        network = load_sound_network(folder)
        self.vae, self._params = network.module, jax.device_put(network.params)

    def __call__(self, audio: Sound) -> Sound:
        """The reconstruction, in the length of the sound."""
        mean, _ = encode_sound(self.vae, self._params, audio[None])
        decoded = decode_sound(self.vae, self._params, self.vae.normalize(mean))
        return np.asarray(decoded[0, : len(audio)])
