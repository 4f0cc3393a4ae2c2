"""Encodes captions with a finished text encoder and its tokenizer."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jvdit.data.plan import TEXT_MULTIPLE
from jvdit.data.tokenizer import Tokenizer, sentencepiece_of
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.text_encoder import TextEncoder
from jvdit.weights.folders import load_text_encoder
from jvdit.weights.network import Network, load_network
from jvdit.weights.parameters import (
    model_folder,
    module_fields,
    save_weights,
    weights_hash,
)
from jvdit.weights.release import is_release, read_release

BATCH = 32  # captions in a batch
_REFERENCE = "text_encoder.json"


@dataclasses.dataclass
class CaptionEncoder:
    """Encodes captions to text states, in batches of one shape.

    Attributes:
        network: the `TextEncoder` and its parameters.
        tokenizer: tokenizer of the captions.
        release: folder of the released model that the encoder comes from, or "".
    """

    network: Network
    tokenizer: Tokenizer
    release: str = ""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]):
        """Loads a text encoder and its tokenizer.

        Args:
            folder: a training workdir, its `model` folder, a folder of latents, or a
                released model.

        Raises:
            FileNotFoundError: the encoder or its tokenizer is missing.
        """
        folder = model_folder(folder)
        if (folder / _REFERENCE).exists():
            folder = pathlib.Path(read_json(folder / _REFERENCE, "copy it anew", str))
        if is_release(folder):
            release = read_release(folder)
            network = load_text_encoder(release.parts["text_encoder"])
            tokenizer = release_tokenizer(release.tokenizer)
            return cls(network, tokenizer, str(folder.absolute()))
        model = folder / "tokenizer.model"
        if not model.exists():
            raise FileNotFoundError(
                f"{folder} holds no text encoder (tokenizer.model is missing); give "
                "the workdir of a training that trained one."
            )
        network = load_network(folder / "text_encoder", TextEncoder)
        return cls(network, Tokenizer(model))

    def save(self, folder: pathlib.Path) -> None:
        """Saves the encoder, or for a released model only the path of the release."""
        if self.release:
            write_json(folder / _REFERENCE, self.release)
            return
        fields = module_fields(self.module)
        save_weights(folder / "text_encoder", self.network.params, fields)
        write_atomically(folder / "tokenizer.model", self.tokenizer.model)

    @property
    def module(self) -> TextEncoder:
        """The text encoder module."""
        return self.network.module

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
    name = os.fspath(file)
    model = sentencepiece_of(name) if name.endswith(".json") else name
    return Tokenizer(model, byte_fallback="unk", clean=True)


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
