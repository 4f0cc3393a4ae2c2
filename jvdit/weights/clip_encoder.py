"""Encodes clips to latents with a finished autoencoder, on all devices of a host."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jvdit.machine.compilation import jit
from jvdit.models.video_vae import VideoVAE, to_float
from jvdit.models.video_vae_chunked import encode_stream, split
from jvdit.sharding import batch_sharding, host_mesh, replicated
from jvdit.weights.folders import load_vae
from jvdit.weights.network import Network, load_network
from jvdit.weights.parameters import module_fields, weights_hash
from jvdit.weights.release import is_release, read_release

BATCH = 32  # most clips in a device's batch
PIXELS = 1 << 23  # most pixels in it; a clip with more is encoded in pieces


@dataclasses.dataclass
class ClipEncoder:
    """Encodes batches of clips to latents, divided over the devices of this host.

    Attributes:
        network: the `VideoVAE` and its parameters.
    """

    network: Network

    @classmethod
    def load(cls, vae: str | os.PathLike[str]):
        """Loads an autoencoder of our own or of a released model.

        Args:
            vae: a training workdir, its `model` folder, a folder of weights, or a
                released model.

        Raises:
            FileNotFoundError: there is no autoencoder in the folder.
        """
        if is_release(vae):
            return cls(load_vae(read_release(vae).parts["vae"]))
        return cls(load_network(_weights_folder(vae), VideoVAE))

    @property
    def module(self) -> VideoVAE:
        """The autoencoder module."""
        return self.network.module

    @property
    def params(self) -> Any:
        """The parameters of the autoencoder."""
        return self.network.params

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What identifies this autoencoder: its hash and fields, as JSON values."""
        return {"hash": weights_hash(self.params), "fields": module_fields(self.module)}

    def rows(self, clips: int, size: Sequence[int]) -> int:
        """The batch size to encode clips of one size with.

        There are few batch sizes, and so few compilations, for any number of clips.

        Args:
            clips: how many clips of this size there are.
            size: their frames, height and width in pixels.
        """
        ways = self._mesh.size
        each = 1 << (-(-clips // ways) - 1).bit_length()
        return ways * min(each, BATCH, max(PIXELS // math.prod(size), 1))

    def __call__(
        self, video: UInt8[np.ndarray, "b T H W 3"]
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
        """Encodes a batch of `rows` clips to the posterior's mean and log variance.

        Returns before the devices have finished; reading the arrays waits for them.

        Args:
            video: RGB pixels in [0, 255].
        """
        with jax.set_mesh(self._mesh):
            if video[0, ..., 0].size <= PIXELS:
                return _whole(self.module, self._placed, self._divided(video))
            pieces = split(video, self.module.temporal_compression)
            pieces = (to_float(self._divided(piece)) for piece in pieces)
            moments = [*encode_stream(self.module, self._placed, pieces)]
            mean, logvar = (
                jnp.concatenate(x, axis=1) for x in zip(*moments, strict=True)
            )
            return mean, logvar

    @cached_property
    def _mesh(self):
        return host_mesh()

    @cached_property
    def _placed(self):
        return jax.device_put(self.params, replicated(self._mesh))

    def _divided(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, batch_sharding(self._mesh))


@partial(jit, static_argnames="vae")
def _whole(vae: VideoVAE, params: Any, video: jax.Array):
    return vae.apply({"params": params}, to_float(video), method="encode")


def _weights_folder(vae: str | os.PathLike[str]) -> pathlib.Path:
    folder = pathlib.Path(vae)
    for inside in ("model/vae", "vae"):
        if (folder / inside / "config.json").exists():
            return folder / inside
    return folder
