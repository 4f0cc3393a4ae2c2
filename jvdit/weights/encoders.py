"""Encodes captions with a finished text encoder, and clips with an autoencoder."""

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

from jvdit.data.plan import TEXT_MULTIPLE
from jvdit.data.sounds import in_channels
from jvdit.data.tokenizer import Tokenizer
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.machine.files import replacing, write_atomically
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.audio_vae_chunked import encode_sound
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE, to_float
from jvdit.models.video_vae_chunked import encode_stream, split
from jvdit.sharding import batch_sharding, host_mesh, replicated
from jvdit.weights.folders import load_audio_vae, load_text_encoder, load_vae
from jvdit.weights.parameters import (
    Network,
    load_network,
    model_folder,
    module_fields,
    weights_hash,
)
from jvdit.weights.release import is_release, read_release

BATCH = 32  # captions in a batch, and most clips in a device's batch
PIXELS = 1 << 23  # most pixels in it; a clip with more is encoded in pieces
_REFERENCE = "text_encoder.json"
_NULL = "empty_caption.npy"


@dataclasses.dataclass
class CaptionEncoder:
    """Encodes captions to text states, in batches of one shape.

    Attributes:
        network: the `TextEncoder` and its parameters.
        tokenizer: tokenizer of the captions.
        release: folder of the released model that the encoder comes from, or "".
        kept_null: the states of the empty caption, if they lay beside its reference.
    """

    network: Network
    tokenizer: Tokenizer
    release: str = ""
    kept_null: Float[np.ndarray, "s e"] | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]):
        """Loads a text encoder and its tokenizer.

        Args:
            folder: a training workdir, its `model` folder, a folder of latents, or a
                released model.

        Raises:
            FileNotFoundError: the encoder or its tokenizer is missing.
        """
        folder, null = model_folder(folder), None
        if (folder / _REFERENCE).exists():
            if (folder / _NULL).exists():
                null = np.load(folder / _NULL)
            folder = pathlib.Path(read_json(folder / _REFERENCE, "copy it anew", str))
        if is_release(folder):
            release = read_release(folder)
            network = load_text_encoder(release.parts["text_encoder"])
            tokenizer = release_tokenizer(release.tokenizer)
            return cls(network, tokenizer, str(folder.absolute()), null)
        model = folder / "tokenizer.model"
        if not model.exists():
            raise FileNotFoundError(
                f"{folder} holds no text encoder (tokenizer.model is missing); give "
                "the workdir of a training that trained one."
            )
        network = load_network(folder / "text_encoder", TextEncoder)
        return cls(network, Tokenizer(model))

    def save(self, folder: pathlib.Path) -> None:
        """Saves the encoder; for a released model its path and the empty caption.

        A training with cached states then needn't read 11 GB for that one.
        """
        if self.release:
            write_json(folder / _REFERENCE, self.release)
            with replacing(folder / _NULL) as scratch, scratch.open("wb") as file:
                np.save(file, self.null.astype(np.float32))
            return
        self.network.save(folder / "text_encoder")
        write_atomically(folder / "tokenizer.model", self.tokenizer.model)

    @property
    def module(self) -> TextEncoder:
        """The text encoder module."""
        return self.network.module

    @property
    def null(self) -> Float[np.ndarray, "s e"]:
        """The states of the empty caption."""
        return self([""], 1)[0] if self.kept_null is None else self.kept_null

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What identifies this text encoder: hash, tokenizer and width, as JSON."""
        return {
            "hash": weights_hash(self._placed),
            "tokenizer": self.tokenizer.fingerprint,
            "width": self.module.width,
        }

    def __call__(
        self, captions: Sequence[str], max_length: int
    ) -> list[Float[np.ndarray, "s e"]]:
        """Encodes captions; each gets one text state for each of its tokens.

        Args:
            captions: any number of captions.
            max_length: most tokens of a caption; longer ones are cut.
        """
        return encode_captions(
            self.module, self._placed, self.tokenizer, captions, max_length, BATCH
        )

    def free(self) -> None:
        """Frees the device memory of parameters that were loaded from files."""
        if callable(self.network.source):
            self.__dict__.pop("_placed", None)

    @cached_property
    def _placed(self):
        return jax.device_put(self.network.load())


def release_tokenizer(file: os.PathLike[str]) -> Tokenizer:
    """Loads a released model's tokenizer, which cleans text as its authors do.

    Args:
        file: a sentencepiece model, or a `tokenizer.json`.
    """
    return Tokenizer(os.fspath(file), byte_fallback="unk", clean=True)


def encode_captions(
    module: TextEncoder,
    params: Any,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    max_length: int,
    batch: int,
) -> list[Float[np.ndarray, "s e"]]:
    """Encodes captions; each gets one text state for each of its tokens.

    Args:
        module: the text encoder.
        params: its parameters, on the devices.
        tokenizer: tokenizer of the captions.
        captions: any number of captions.
        max_length: most tokens of a caption; longer ones are cut.
        batch: how many captions to encode in a batch.
    """
    # Rounded up, so that few lengths need compiling.
    length = -(-max_length // TEXT_MULTIPLE) * TEXT_MULTIPLE
    states: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        ids = np.zeros((batch, length), np.int32)
        segment = np.zeros_like(ids)
        for row, caption in enumerate(captions[start : start + batch]):
            tokens = tokenizer.encode(caption, max_length)
            ids[row, : len(tokens)], segment[row, : len(tokens)] = tokens, 1
        encoded = to_host(_apply(module, params, ids, segment))
        counts = segment.sum(1)[: len(captions) - start]
        states += [encoded[row, :count] for row, count in enumerate(counts)]
    return states


@partial(jit, static_argnames="module")
def _apply(module: TextEncoder, params: Any, ids: jax.Array, segment: jax.Array):
    return module.apply({"params": params}, ids, segment)


@dataclasses.dataclass
class _Divided:
    """A finished autoencoder, whose batches are divided over this host's devices.

    Attributes:
        network: the module and its parameters.
    """

    network: Network

    @property
    def module(self) -> Any:
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

    @cached_property
    def _mesh(self):
        return host_mesh()

    @cached_property
    def _placed(self):
        return jax.device_put(self.params, replicated(self._mesh))

    def _split(self, rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, batch_sharding(self._mesh))


class ClipEncoder(_Divided):
    """Encodes batches of clips to latents."""

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
        return cls(load_network(_folder_of(vae, "vae"), VideoVAE))

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
                return _whole(self.module, self._placed, self._split(video))
            pieces = split(video, self.module.temporal_compression)
            pieces = (to_float(self._split(piece)) for piece in pieces)
            moments = [*encode_stream(self.module, self._placed, pieces)]
            mean, logvar = (jnp.concatenate(x, 1) for x in zip(*moments, strict=True))
            return mean, logvar


class SoundEncoder(_Divided):
    """Encodes batches of sounds to latents."""

    @classmethod
    def load(cls, vae: str | os.PathLike[str]):
        """Loads an audio autoencoder, see `load_sound_network`."""
        return cls(load_sound_network(vae))

    def __call__(
        self, audio: Float[np.ndarray, "b a e"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Encodes a batch of sounds to the posterior's mean and log variance.

        Args:
            audio: samples in [-1, 1].
        """
        audio = np.stack([in_channels(x, self.module.channels) for x in audio])
        spare = -len(audio) % self._mesh.size
        audio = np.pad(audio, ((0, spare), (0, 0), (0, 0)))
        with jax.set_mesh(self._mesh):
            moments = encode_sound(self.module, self._placed, self._split(audio))
        mean, logvar = (x[: len(x) - spare] for x in moments)
        return mean, logvar


@partial(jit, static_argnames="vae")
def _whole(vae: VideoVAE, params: Any, video: jax.Array):
    return vae.apply({"params": params}, to_float(video), method="encode")


def _folder_of(vae: str | os.PathLike[str], *names: str) -> pathlib.Path:
    """The folder of an autoencoder: in a workdir, in a whole model, or itself."""
    inside = [f"{place}{name}" for name in names for place in ("model/", "")]
    within = (pathlib.Path(vae) / name for name in (*inside, ""))
    found = (x for x in within if (x / "config.json").exists())
    return next(found, pathlib.Path(vae))


def load_sound_network(vae: str | os.PathLike[str]) -> Network:
    """Opens an audio autoencoder of our own, or the released KVAE-Audio.

    Args:
        vae: a training workdir, its `model` folder, a folder of weights, or the folder
            of the released autoencoder.

    Raises:
        FileNotFoundError: there is no autoencoder in the folder.
        ValueError: it is that of something else, or damaged.
    """
    config = (folder := _folder_of(vae, "audio_vae", "vae")) / "config.json"
    # Only the configs of releases say what class they are of.
    if config.exists() and "_class_name" in read_json(config, "copy it anew", dict):
        return load_audio_vae(folder)
    return load_network(folder, AudioVAE)
