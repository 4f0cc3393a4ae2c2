"""Measures the memory that sampling from a released model takes, without a device.

    pip install libtpu
    python tools/memory.py wan2.2-ti2v-5b
    python tools/memory.py wan2.2-t2v-a14b --size 480x832 --frames 81

Nothing is downloaded and nothing runs: each network is compiled at its real size for
one TPU chip, which needn't be present, and the compiler reports the memory: that of
parameters and inputs, and the peak of everything else. Networks are on the device one
after another, so the largest row is what is needed. Convolutions on a TPU copy a lot;
the last row shows the autoencoder's memory on other devices.
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

from jvdit.generation.request import size_fields
from jvdit.models import dit, text_encoder, video_vae
from jvdit.pods.programs import pod_mesh, sample_program, vae_program
from jvdit.sharding import make_mesh, replicated
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


def text_program(dtype):
    """Lowers the text encoder on two prompts."""
    sizes = text_encoder.VARIANTS["umt5-xxl"]
    module = text_encoder.TextEncoder(**sizes, dtype=dtype, param_dtype=dtype)
    ids = jax.ShapeDtypeStruct((_PROMPTS, TEXT_LENGTH), jnp.int32)
    params = abstract(module, ids, ids)
    apply = jax.jit(lambda params, *x: module.apply({"params": params}, *x))
    return apply.lower(*placed((params, ids, ids)))


def dit_program(name, grid, dtype):
    """Lowers solver steps of one clip, with guidance."""
    kinds = {"dtype": dtype, "param_dtype": dtype, "scan_layers": True}
    module = dit.DiT(**dit.VARIANTS[name], **kinds)
    return sample_program(module, chip(), 1, math.prod(grid), TEXT_LENGTH)


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
    args = parser.parse_args()
    clip = size_fields(RECIPES[args.name], args.size, args.frames, None)
    which = "wan2.2" if args.name.endswith("ti2v-5b") else "wan2.1"
    vae = video_vae.VideoVAE(**video_vae.VARIANTS[which])
    size = clip["frames"], clip["height"], clip["width"]
    latent = vae.latent_shape(*size)
    tokens = tuple(a // b for a, b in zip(latent, PATCH_SIZE, strict=True))
    cpu = make_mesh({"data": 1}, jax.devices()[:1])

    def decoding(mesh):
        return vae_program(vae, mesh, size, "decode")[0]

    programs = {
        "text encoder (bfloat16)": lambda: text_program(jnp.bfloat16),
        "DiT step, guided (bfloat16)": lambda: dit_program(
            args.name, tokens, jnp.bfloat16
        ),
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
    Console().print(table)


if __name__ == "__main__":
    main()
