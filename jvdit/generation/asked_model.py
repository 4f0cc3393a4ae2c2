"""The model and the devices that the flags of `python -m jvdit.sample` name."""

import pathlib
import sys

import jax
from jax.sharding import Mesh

from jvdit.box import FOLDER
from jvdit.generation.generator import Generator
from jvdit.generation.sample_flags import (
    DIT,
    DIT_LOW,
    DTYPE,
    LORA,
    LORA_HIGH,
    LORA_LOW,
    MESH,
    PRESET,
    PRETRAINED,
    QUANTIZE,
    ROWS,
    SCALE,
    SCALE_2,
    SHIFT,
    VARIANT,
    WORKDIR,
)
from jvdit.sharding import make_mesh, parse_mesh, sampling_sizes
from jvdit.weights.adapters import strengths
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import EXPERTS, open_bundle, with_adapters


def asked_mesh(prompts: int) -> Mesh:
    """The devices: a row to each, and what is left over divides the tokens of rows.

    Args:
        prompts: how many clips are asked for.
    """
    if MESH.value is not None:
        return make_mesh(parse_mesh(MESH.value))
    # Where one expert isn't guided, the other's pairs of rows follow one another.
    guided = 1 not in (SCALE.value, SCALE_2.value) and not PRESET.value
    rows = min(prompts, ROWS.value) * (2 if guided else 1)
    return make_mesh(sampling_sizes(rows, jax.device_count()))


def asked_generator(mesh: Mesh) -> Generator:
    """The model that the flags name, with its adapters; says what room it takes.

    Raises:
        FileNotFoundError: the model or a part of it is missing.
        ValueError: flags contradict each other, or the folder holds something else.
    """
    model = asked_bundle(mesh)
    adapters = (
        (LORA, EXPERTS),
        (LORA_HIGH, EXPERTS[:1]),
        (LORA_LOW, EXPERTS[1:]),
    )
    for flag, networks in adapters:
        if files := strengths(flag.value):
            model = with_adapters(model, files, networks)
    if SCALE_2.value is not None and not model.boundary:
        raise ValueError("--guidance_scale_2 is for models of two experts.")
    generator = Generator(model, mesh, quantize=QUANTIZE.value or "")
    print(generator.room.told, file=sys.stderr)
    return generator


def asked_bundle(mesh: Mesh) -> Bundle:
    """The model that the flags name, without their adapters; see `asked_generator`."""
    if WORKDIR.value is not None and PRETRAINED.value is not None:
        raise ValueError("give one of --workdir and --pretrained, not both.")
    if PRETRAINED.value is None:
        for flag in (DIT, DIT_LOW, SHIFT, VARIANT):
            if flag.value:
                raise ValueError(f"--{flag.name} goes with --pretrained.")
        # An absolute path, which is no id on the hub.
        return open_bundle(pathlib.Path(WORKDIR.value or FOLDER).absolute(), mesh)
    return open_bundle(
        PRETRAINED.value,
        mesh,
        dtype=DTYPE.value,
        shift=SHIFT.value,
        parts={x.name: x.value for x in (DIT, DIT_LOW) if x.value},
        variant=VARIANT.value,
    )
