"""How much memory it takes to sample a released model, from compiled programs.

    pip install libtpu
    python tools/memory.py wan2.2-ti2v-5b
    python tools/memory.py wan2.2-t2v-a14b --size 480x832 --frames 81

Nothing is downloaded and nothing runs: each network is compiled at its real size for
one chip of a TPU (which need not be there), and the compiler says what it would take:
parameters and inputs, and the most that is alive besides. Networks are on the device
one after another, so the largest row is what is needed. Attention holds the scores of
one head here; flash attention, as on a GPU, holds none: there this is an upper bound.
A TPU's convolutions copy a lot; the last row says what the autoencoder takes elsewhere.
"""

import argparse
import os
from unittest import mock

# Before jax: compile for a TPU, run nothing on one.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.flow import Path, TimestepPolicy
from jvdit.generation.request import size_fields
from jvdit.generation.sampling import Stepper, start_noise
from jvdit.models import dit, text_encoder, video_vae
from jvdit.models.video_vae_chunked import DECODED_PIXELS, decode_step
from jvdit.pretrained.configs import PATCH_SIZE
from jvdit.pretrained.folders import dit_inputs
from jvdit.pretrained.recipes import RECIPES, TEXT_LENGTH
from jvdit.shapes import Text

GB = 1e9
TOPOLOGY = "v5p:2x2x1"  # a chip of which has 95 GB
_PROMPTS = 2  # the prompt and the negative one


def abstract(module, *inputs, method=None):
    """Shapes of a module's parameters."""
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda *x: module.init(key, *x, method=method)["params"], *inputs
    )


def placed(shapes):
    """The same shapes, on one chip."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    place = NamedSharding(Mesh(np.array(chips[:1]), ("data",)), PartitionSpec())
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )


def text_program(dtype):
    """The text encoder on two prompts."""
    sizes = text_encoder.VARIANTS["umt5-xxl"]
    module = text_encoder.TextEncoder(**sizes, dtype=dtype, param_dtype=dtype)
    ids = jax.ShapeDtypeStruct((_PROMPTS, TEXT_LENGTH), jnp.int32)
    params = abstract(module, ids, ids)
    apply = jax.jit(lambda params, *x: module.apply({"params": params}, *x))
    return apply.lower(*placed((params, ids, ids)))


def dit_program(name, grid, dtype):
    """One step of the solver, with guidance."""
    kinds = {"dtype": dtype, "param_dtype": dtype, "scan_layers": True}
    module = dit.DiT(**dit.VARIANTS[name], **kinds)
    params = jax.eval_shape(module.init, jax.random.key(0), *dit_inputs(module))
    n = grid[0] * grid[1] * grid[2]
    float32 = jnp.float32
    arrays = {
        "latents": jax.ShapeDtypeStruct((1, n, module.in_channels), float32),
        "position": jax.ShapeDtypeStruct((1, n, 3), float32),
        "segment": jax.ShapeDtypeStruct((1, n), jnp.int32),
    }
    for key in ("cond", "control"):
        if channels := getattr(module, f"{key}_channels"):
            arrays[key] = jax.ShapeDtypeStruct((1, n, channels), float32)
    running = jax.eval_shape(
        lambda *x: start_noise(
            *x,
            policy=TimestepPolicy(),
            steps=2,
            solver="unipc",
            one_clip=True,
            noisy=False,
        ),
        arrays,
        jax.ShapeDtypeStruct((1, 2), jnp.uint32),
    )
    states = jax.ShapeDtypeStruct((1, TEXT_LENGTH, module.text_width), float32)
    image = None
    if module.image_width:
        length = module.image_length or 257
        image = jax.ShapeDtypeStruct((1, length, module.image_width), float32)
    text = jax.eval_shape(lambda x, y: Text(x, image=y), states, image)
    return Stepper(module, Path()).lower(
        *placed(({"params": params["params"]}, running, (text, text))),
        solver="unipc",
        guidance=Guidance(5.0),
        span=(0, 2),
        skips=None,
    )


def vae_program(module, grid, on_cpu=False):
    """Decoding a piece in the middle of the video, for a TPU or a CPU."""
    f, h, w = grid
    side = module.spatial_compression
    pixels = h * w * side**2 * module.temporal_compression
    piece = min(max(DECODED_PIXELS // pixels, 1), max(f - 1, 1))
    video = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    params = abstract(module, video)
    first, later = (
        jax.ShapeDtypeStruct((1, frames, h, w, module.latent_channels), jnp.float32)
        for frames in (1, piece)
    )
    _, cache = jax.eval_shape(
        lambda params, x: decode_step(module, params, x, {}), params, first
    )
    if on_cpu:
        return decode_step.lower(module, params, later, cache)
    # Convolutions have a form of their own on a CPU, which is not meant here.
    with mock.patch("jax.default_backend", return_value="tpu"):
        return decode_step.lower(module, *placed((params, later, cache)))


def main():
    """Compiles the three programs and prints what they take."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=[*RECIPES])
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int)
    args = parser.parse_args()
    clip = size_fields(RECIPES[args.name], args.size, args.frames, None)
    which = "wan2.2" if args.name.endswith("ti2v-5b") else "wan2.1"
    vae = video_vae.VideoVAE(**video_vae.VARIANTS[which])
    latent = vae.latent_shape(clip["frames"], clip["height"], clip["width"])
    tokens = tuple(a // b for a, b in zip(latent, PATCH_SIZE, strict=True))
    programs = {
        "text encoder (bfloat16)": lambda: text_program(jnp.bfloat16),
        "DiT step, guided (bfloat16)": lambda: dit_program(
            args.name, tokens, jnp.bfloat16
        ),
        "autoencoder, a piece (float32)": lambda: vae_program(vae, latent),
        "the same, in the form of a CPU": lambda: vae_program(vae, latent, True),
    }
    size = f"{clip['frames']} x {clip['height']} x {clip['width']}"
    table = Table(title=f"{args.name}, {size}: GB on a TPU {TOPOLOGY[:3]}")
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
