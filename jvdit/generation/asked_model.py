"""The model and the devices that the flags of `python -m jvdit.sample` name."""

import sys

import jax
from jax.sharding import Mesh

from jvdit.generation import model_flags
from jvdit.generation import sample_flags as asked
from jvdit.generation.generator import Generator
from jvdit.sharding import make_mesh, parse_mesh, sampling_sizes
from jvdit.weights.adapters import strengths
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import EXPERTS, with_adapters


def asked_mesh(prompts: int) -> Mesh:
    """The devices: a row to each, and what is left over divides the tokens of rows.

    Args:
        prompts: how many clips are asked for.
    """
    if asked.MESH.value is not None:
        return make_mesh(parse_mesh(asked.MESH.value))
    settings = asked.sampling_settings()
    # Where one expert isn't guided, the other's pairs of rows follow one another.
    scales = settings.guidance_scale, settings.guidance_scale_2
    guided = 1 not in scales and not settings.preset
    rows = min(prompts, asked.ROWS.value) * (2 if guided else 1)
    return make_mesh(sampling_sizes(rows, jax.device_count()))


def asked_generator(mesh: Mesh) -> Generator:
    """The model that the flags name, with its adapters; says what room it takes.

    Raises:
        FileNotFoundError: the model or a part of it is missing.
        ValueError: flags contradict each other, or the folder holds something else.
    """
    model = asked_bundle(mesh)
    for flag, networks in (
        (model_flags.LORA, EXPERTS),
        (asked.LORA_HIGH, EXPERTS[:1]),
        (asked.LORA_LOW, EXPERTS[1:]),
    ):
        if files := strengths(flag.value):
            model = with_adapters(model, files, networks)
    if asked.SETTINGS["guidance_scale_2"].value is not None and not model.boundary:
        raise ValueError("--guidance_scale_2 is for models of two experts.")
    generator = Generator(model, mesh, quantize=model_flags.QUANTIZE.value or "")
    print(generator.room.told, file=sys.stderr)
    return generator


def asked_bundle(mesh: Mesh) -> Bundle:
    """The model that the flags name, without their adapters; see `asked_generator`."""
    if model_flags.PRETRAINED.value is None:
        for flag in (asked.DIT, asked.DIT_LOW, asked.SHIFT, asked.VARIANT):
            if flag.value:
                raise ValueError(f"--{flag.name} goes with --pretrained.")
    parts = {x.name: x.value for x in (asked.DIT, asked.DIT_LOW) if x.value}
    how = {x.name: x.value for x in (asked.DTYPE, asked.SHIFT, asked.VARIANT)}
    return model_flags.named_bundle(mesh, parts=parts, **how)
