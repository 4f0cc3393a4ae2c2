"""The autoencoders of a model on the devices of a generator: encode and decode."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip, Latents
from jvdit.generation.room import Residence
from jvdit.generation.sound_spans import blended
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models import video_vae_chunked as chunked
from jvdit.models.audio_vae_chunked import decode_sound, encode_sound
from jvdit.models.video_vae import to_uint8
from jvdit.sharding import autoencoder_mesh
from jvdit.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Codec:
    """Turns clips into normalised latents, and back.

    Attributes:
        model: the model.
        params: parameters by network name, on the mesh.
        mesh: the device mesh.
    """

    model: Bundle
    params: Residence
    mesh: Mesh

    def clips(
        self,
        latents: Mapping[int, Latents],
        requests: Sequence[Request],
        on_frames: Callable[[int, int], None],
    ) -> Iterator[tuple[int, GeneratedClip]]:
        """Decodes the clips of a batch; pictures of one size are decoded together.

        Args:
            latents: normalised latents, by the index of their request.
            requests: complete ones.
            on_frames: progress callback, as of `decode`.

        Yields:
            The index of a request, and its clip.
        """
        shapes = {i: x.picture.shape for i, x in latents.items()}
        for shape in dict.fromkeys(shapes.values()):
            alike = [i for i, other in shapes.items() if other == shape]
            stack = np.stack([latents[i].picture for i in alike])
            for i, video in zip(alike, self.decode(stack, on_frames), strict=True):
                clip = self._clip(requests[i], video, latents[i].sound)
                yield i, clip._replace(together=len(latents))

    def _clip(
        self, request: Request, video: np.ndarray, sound: np.ndarray | None
    ) -> GeneratedClip:
        """A clip of its picture and its latent sound; what was given stays as it is."""
        video = request.kept(video, "inpaint" in self.model.conditions)
        clip = GeneratedClip(video, request.fps or 8.0)
        if sound is None:
            return clip
        vae = self.model.audio_vae
        rate, given = vae.sample_rate, request.waveform(vae.sample_rate, vae.channels)
        if given is not None and not request.keep_sound:
            return clip._replace(audio=given, audio_rate=rate)
        audio = self.decode_sound(sound, request.samples(rate))
        if given is not None:
            audio = blended(audio, given, request.sound_spans(), rate)
        return clip._replace(audio=audio, audio_rate=rate)

    def decode(
        self,
        latents: Float[np.ndarray, "b f h w c"],
        on_frames: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "b T H W 3"]:
        """Decodes the pictures of clips of one size, a few latent frames at a time.

        Args:
            latents: normalised latents.
            on_frames: progress callback, called with the frames decoded and in all.
        """
        vae = self.model.vae
        total, frames = vae.video_shape(*latents.shape[1:4])[0], []
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latents.shape[2:4])):
            for video in chunked.decode_normalized(vae, self.params["vae"], latents):
                frames.append(to_host(_bytes(video)))
                if on_frames is not None:
                    on_frames(sum(x.shape[1] for x in frames), total)
        return np.concatenate(frames, axis=1)

    def decoder(
        self,
    ) -> Callable[[Float[np.ndarray, "f h w c"]], UInt8[np.ndarray, "T H W 3"]]:
        """Makes a function that decodes a clip piece by piece, in order.

        Each call goes on from the state that the one before left in the autoencoder, so
        all of them together give what the whole clip would.
        """
        vae, cache = self.model.vae, {}

        def decode(latents: np.ndarray) -> np.ndarray:
            nonlocal cache
            x = vae.denormalize(jnp.asarray(latents)[None])
            pieces = [x] if cache else [x[:, :1], x[:, 1:]]
            frames, size = [], latents.shape[1:3]
            with jax.set_mesh(autoencoder_mesh(self.mesh, *size)):
                params = self.params["vae"]
                most = chunked.decoded_at_once(vae, len(latents) + 1, *size)
                for piece in pieces:
                    for start in range(0, piece.shape[1], most):
                        part = piece[:, start : start + most]
                        video, cache = chunked.decode_step(vae, params, part, cache)
                        frames.append(to_host(_bytes(video))[0])
            return np.concatenate(frames)

        return decode

    def encode(
        self, video: Float[np.ndarray, "T H W 3"]
    ) -> Float[np.ndarray, "f h w c"]:
        """Encodes pixels in [-1, 1] to the posterior's mean."""
        vae = self.model.vae
        _, *latent = vae.latent_shape(*video.shape[:3])
        with jax.set_mesh(autoencoder_mesh(self.mesh, *latent)):
            return chunked.encode_normalized(vae, self.params["vae"], video)

    def decode_sound(
        self, latents: Float[np.ndarray, "n c"], samples: int
    ) -> Float[np.ndarray, "a e"]:
        """Decodes a sound; of its last latent as much as there are samples.

        Args:
            latents: normalised latents.
            samples: of the sound.
        """
        with jax.set_mesh(self.mesh):
            params = self.params["audio_vae"]
            audio = decode_sound(self.model.audio_vae, params, latents[None])
            return np.asarray(to_host(audio), np.float32)[0, :samples]

    def encode_sound(self, audio: Float[np.ndarray, "a e"]) -> Float[np.ndarray, "n c"]:
        """Encodes samples in [-1, 1] to the posterior's mean."""
        vae = self.model.audio_vae
        with jax.set_mesh(self.mesh):
            mean, _ = encode_sound(vae, self.params["audio_vae"], audio[None])
            return np.asarray(to_host(vae.normalize(mean)), np.float32)[0]


_bytes = jit(to_uint8)
