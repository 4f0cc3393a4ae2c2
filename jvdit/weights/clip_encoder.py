"""A finished autoencoder on all devices of this host: from clips to latents."""

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
from jvdit.weights.network import Network
from jvdit.weights.parameters import build, load_weights, module_fields, weights_hash
from jvdit.weights.release import is_release, read_release

BATCH = 32  # clips that a device takes at once, fewer where they have many pixels
PIXELS = 1 << 23  # of those; a clip of more is encoded piece by piece


@dataclasses.dataclass
class ClipEncoder:
    """Encodes clips in batches, of which every device of this host has a part.

    Attributes:
        network: a `VideoVAE`.
    """

    network: Network

    @classmethod
    def load(cls, vae: str | os.PathLike[str]):
        """Loads an autoencoder of ours or of a released model.

        Args:
            vae: its workdir, `model` folder or weights, or the released model.

        Raises:
            FileNotFoundError: there is none.
        """
        if is_release(vae):
            return cls(load_vae(read_release(vae).parts["vae"]))
        params, fields = load_weights(_weights_folder(vae))
        return cls(Network(build(VideoVAE, fields), params))

    @property
    def module(self) -> VideoVAE:
        """The network's."""
        return self.network.module

    @property
    def params(self) -> Any:
        """The network's."""
        return self.network.params

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tells this autoencoder from others, as JSON values."""
        return {"hash": weights_hash(self.params), "fields": module_fields(self.module)}

    def rows(self, clips: int, size: Sequence[int]) -> int:
        """How many clips make a batch, of so many of `size` (frames, height, width).

        Few sizes of batches, so few compilations, whatever the number of clips.
        """
        ways = self._mesh.size
        each = 1 << (-(-clips // ways) - 1).bit_length()
        return ways * min(each, BATCH, max(PIXELS // math.prod(size), 1))

    def __call__(
        self, video: UInt8[np.ndarray, "b T H W 3"]
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
        """(mean, logvar) of the latents of a batch of `rows` clips.

        They may still be on their way: the devices work while the host goes on.
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
