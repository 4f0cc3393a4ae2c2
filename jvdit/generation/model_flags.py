"""The flags that say which model `jvdit.sample` and `jvdit.serve` open."""

import pathlib
from typing import Any

from absl import flags
from jax.sharding import Mesh

from jvdit.box import FOLDER
from jvdit.weights.bundle import Bundle
from jvdit.weights.few_bits import FORMS
from jvdit.weights.opening import open_bundle

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a training run, or of its finished model (default: the small model in "
    "the box).",
)
PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "Folder of a released Wan 2 model, or its id on the Hugging Face Hub, instead of "
    "--workdir.",
)
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "Adapter files (LoRA and its kin), each perhaps with its strength: FILE:0.8,FILE.",
)
QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    [*FORMS],
    "Hold the weights of the DiT and of the text encoder in few bits.",
)


def named_bundle(mesh: Mesh, **options: Any) -> Bundle:
    """The model that the flags name, without adapters.

    Args:
        mesh: the device mesh.
        **options: of `open_bundle`, for a released model.

    Raises:
        FileNotFoundError: the model or a part of it is missing.
        ValueError: both flags are given, or the folder holds something else.
    """
    if WORKDIR.value is not None and PRETRAINED.value is not None:
        raise ValueError("give one of --workdir and --pretrained, not both.")
    if PRETRAINED.value is not None:
        return open_bundle(PRETRAINED.value, mesh, **options)
    # An absolute path, which is no id on the hub.
    return open_bundle(pathlib.Path(WORKDIR.value or FOLDER).absolute(), mesh)
