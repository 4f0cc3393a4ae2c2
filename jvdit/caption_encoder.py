"""A finished text encoder with its tokenizer: from captions to states."""

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
from jvdit.data.tokenizer import Tokenizer
from jvdit.models.text_encoder import TextEncoder
from jvdit.training.checkpoint import (
    build,
    load_weights,
    model_folder,
    module_fields,
    save_weights,
    weights_hash,
)

BATCH = 32  # captions


@dataclasses.dataclass
class CaptionEncoder:
    """Encodes captions in batches of one shape.

    Attributes:
        module, params: the network.
        tokenizer: of the captions.
    """

    module: TextEncoder
    params: Any
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: str | os.PathLike[str]):
        """Loads `text_encoder` and `tokenizer.model` of a `model` folder or workdir.

        Raises:
            FileNotFoundError: one of them is missing.
        """
        folder = model_folder(folder)
        model = folder / "tokenizer.model"
        if not model.exists():
            raise FileNotFoundError(
                f"{folder} holds no text encoder (tokenizer.model is missing); give "
                "the workdir of a training that trained one."
            )
        params, fields = load_weights(folder / "text_encoder")
        return cls(build(TextEncoder, fields), params, Tokenizer(model))

    def save(self, folder: pathlib.Path) -> None:
        """Writes what `load` reads."""
        fields = module_fields(self.module)
        save_weights(folder / "text_encoder", self.params, fields)
        (folder / "tokenizer.model").write_bytes(self.tokenizer.model)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tells this text encoder from others, as JSON values."""
        return {
            "hash": weights_hash(self.params),
            "tokenizer": self.tokenizer.fingerprint,
            "width": self.module.width,
        }

    def __call__(
        self, captions: Sequence[str], max_length: int
    ) -> list[Float[np.ndarray, "s e"]]:
        """The states of each caption, as many as it has tokens.

        Args:
            captions: any number.
            max_length: tokens after which a caption is cut.
        """
        return encode_captions(
            self.module, self._placed, self.tokenizer, captions, max_length, BATCH
        )

    @cached_property
    def _placed(self):
        return jax.device_put(self.params)


def encode_captions(
    module: TextEncoder,
    params: Any,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    max_length: int,
    batch: int,
) -> list[Float[np.ndarray, "s e"]]:
    """The states of each caption, as many as it has tokens.

    Args:
        module: the text encoder.
        params: its parameters, on the devices.
        tokenizer: of the captions.
        captions: any number.
        max_length: tokens after which a caption is cut.
        batch: captions at once.
    """
    # Few lengths, few compilations.
    length = -(-max_length // TEXT_MULTIPLE) * TEXT_MULTIPLE
    states: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        ids = np.zeros((batch, length), np.int32)
        segment = np.zeros_like(ids)
        for row, caption in enumerate(captions[start : start + batch]):
            tokens = tokenizer.encode(caption, max_length)
            ids[row, : len(tokens)], segment[row, : len(tokens)] = tokens, 1
        encoded = np.asarray(_apply(module, params, ids, segment))
        counts = segment.sum(1)[: len(captions) - start]
        states += [encoded[row, :count] for row, count in enumerate(counts)]
    return states


@partial(jax.jit, static_argnames="module")
def _apply(module: TextEncoder, params: Any, ids: jax.Array, segment: jax.Array):
    return module.apply({"params": params}, ids, segment)
