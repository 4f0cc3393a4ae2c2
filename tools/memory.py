"""Measures the memory that sampling from a released model takes, without a device.

    pip install libtpu
    python tools/memory.py wan2.2-ti2v-5b
    python tools/memory.py wan2.2-t2v-a14b --size 480x832 --frames 81

Nothing is downloaded and nothing runs: each network is compiled at its real size for
one TPU chip, which needn't be present, and the compiler reports the memory: that of
parameters and inputs, and the peak of everything else. Networks are on the device one
after another, so the largest row is what is needed. Convolutions on a TPU copy a lot;
the last row shows the autoencoder's memory on other devices.

Parameters are counted by `Room`, as `jvdit.sample` and `jvdit.serve` do at every start;
with `--weights` alone, in every form of `--quantize`, and no compiler is needed.
"""

import argparse
import functools
import math
import os

os.environ |= {"JAX_PLATFORMS": "cpu"}  # compile for a TPU, run nothing on one

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jvdit.generation.completion import size_fields
from jvdit.generation.room import Room
from jvdit.models import dit, text_encoder, video_vae
from jvdit.pods.programs import pod_mesh, sample_program, vae_program
from jvdit.sharding import make_mesh, replicated
from jvdit.weights.few_bits import FORMS
from jvdit.weights.parameters import Network
from jvdit.weights.recipes import RECIPES, TEXT_LENGTH
from jvdit.weights.released_configs import PATCH_SIZE

GB = 1e9
TOPOLOGY = "v5p:2x2x1"  # a slice whose chips have 95 GB each
_PROMPTS = 2  # the prompt and the negative prompt


def abstract(module, *inputs, method=None):
    """The shapes of a module's parameters."""
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda *x: module.init(key, *x, method=method)["params"], *inputs
    )


@functools.cache
def chip():
    """A mesh of one TPU chip."""
    return pod_mesh(TOPOLOGY, {"data": 1}, devices=1)


def placed(shapes):
    """The same shapes, placed on one TPU chip."""
    place = replicated(chip())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )


def networks(name):
    """The networks of a released model by name, with the shapes of their parameters."""
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    text = text_encoder.TextEncoder(**text_encoder.VARIANTS["umt5-xxl"], **kinds)
    which = "wan2.2" if name.endswith("ti2v-5b") else "wan2.1"
    backbone = dit.DiT(**dit.VARIANTS[name], **kinds, scan_layers=True)
    video = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), jnp.float32)
    found = {
        "text_encoder": (text, _ids(), _ids()),
        "dit": (backbone, *backbone.example_inputs()),
        "vae": (video_vae.VideoVAE(**video_vae.VARIANTS[which]), video),
    }
    if RECIPES[name]["boundary"]:
        found["dit_low"] = found["dit"]
    return {
        name: Network(module, None, abstract(module, *inputs))
        for name, (module, *inputs) in found.items()
    }


def _ids():
    return jax.ShapeDtypeStruct((_PROMPTS, TEXT_LENGTH), jnp.int32)


def text_program(network):
    """Lowers the text encoder on two prompts."""
    apply = jax.jit(lambda params, *x: network.module.apply({"params": params}, *x))
    return apply.lower(*placed((network.shapes, _ids(), _ids())))


def dit_program(network, grid):
    """Lowers solver steps of one clip, with guidance."""
    return sample_program(network.module, chip(), 1, math.prod(grid), TEXT_LENGTH)


def weights(found):
    """GB of the parameters of each network, by form of `--quantize`."""
    cpu = make_mesh({"data": 1}, jax.devices()[:1])
    return {
        form or "as they are": {
            name: size / GB for name, size in Room(found, cpu, form).sizes(form).items()
        }
        for form in ("", *FORMS)
    }


def main():
    """Compiles the networks and prints the memory that each takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*RECIPES], help="released model")
    parser.add_argument(
        "--size", help="HEIGHTxWIDTH of the clip in pixels (default: the model's)"
    )
    parser.add_argument(
        "--frames", type=int, help="frames of the clip (default: the model's)"
    )
    parser.add_argument(
        "--weights", action="store_true", help="count parameters, and compile nothing"
    )
    args = parser.parse_args()
    found = networks(args.name)
    counted = weights(found)
    table = Table(title=f"{args.name}: GB of the weights")
    for column in ("form", *found):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form, sizes in counted.items():
        table.add_row(form, *(f"{size:.1f}" for size in sizes.values()))
    Console().print(table)
    if not args.weights:
        Console().print(compiled(args, found))


def compiled(args, found):
    """A table of the memory that the compiled programs of networks take."""
    clip = size_fields(RECIPES[args.name], args.size, args.frames, None)
    vae = found["vae"].module
    size = clip["frames"], clip["height"], clip["width"]
    latent = vae.latent_shape(*size)
    tokens = tuple(a // b for a, b in zip(latent, PATCH_SIZE, strict=True))
    cpu = make_mesh({"data": 1}, jax.devices()[:1])

    def decoding(mesh):
        return vae_program(vae, mesh, size, "decode")[0]

    programs = {
        "text encoder (bfloat16)": lambda: text_program(found["text_encoder"]),
        "DiT step, guided (bfloat16)": lambda: dit_program(found["dit"], tokens),
        "autoencoder, a piece (float32)": lambda: decoding(chip()),
        "the same, in the form of a CPU": lambda: decoding(cpu),
    }
    told = " x ".join(map(str, size))
    table = Table(title=f"{args.name}, {told}: GB on a TPU {TOPOLOGY[:3]}")
    for column in ("on the device", "arguments", "besides", "in all"):
        table.add_column(column, justify="left" if column[0] == "o" else "right")
    for name, lower in programs.items():
        memory = lower().compile().memory_analysis()
        held = memory.argument_size_in_bytes / GB
        made = memory.output_size_in_bytes - memory.alias_size_in_bytes
        besides = (memory.temp_size_in_bytes + made) / GB
        table.add_row(name, f"{held:.1f}", f"{besides:.1f}", f"{held + besides:.1f}")
    return table


if __name__ == "__main__":
    main()
