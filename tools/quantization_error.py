"""How far weights in few bits lead a clip's latents astray, step by step.

    python tools/quantization_error.py
    python tools/quantization_error.py --model Wan2.2-TI2V-5B-Diffusers --steps 20

Denoises the same noise with the weights as they are, in float32, and with each form of
`--quantize`; besides with weights as they are and a network that computes in bfloat16.
Prints the largest difference of the latents after every step, by their largest value,
and what the networks take.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jvdit.box import FOLDER
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.machine.command import told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.sharding import make_mesh
from jvdit.weights.bundle import Bundle
from jvdit.weights.few_bits import FORMS
from jvdit.weights.opening import open_bundle
from jvdit.weights.release import is_release


def by_step(
    generator: Generator, requests: Sequence[Request], steps: int, scale: float
) -> np.ndarray:
    """The latents of requests after each step, [steps b n c]."""
    found: list[np.ndarray] = []
    told = lambda done, total, latents: found.append(np.array(latents))  # noqa: E731
    generator.latents(requests, steps=steps, guidance=Guidance(scale), on_step=told)
    return np.stack(found)


def errors(latents: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The largest difference after each step, by the largest value."""
    axes = (1, 2, 3)
    return np.abs(latents - want).max(axes) / np.abs(want).max(axes)


def in_bfloat16(model: Bundle) -> Bundle:
    """The model with networks that compute in bfloat16."""
    networks = {
        name: dataclasses.replace(x, module=x.module.clone(dtype=jnp.bfloat16))
        if name in ("dit", "dit_low", "text_encoder")
        else x
        for name, x in model.networks.items()
    }
    return dataclasses.replace(model, networks=networks)


def main() -> None:
    """Prints the errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(FOLDER), help="folder, or id on the hub")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's)")
    parser.add_argument(
        "--prompts", nargs="+", default=["one object: a small red ball."]
    )
    args = parser.parse_args()
    keep_compilations()
    mesh = make_mesh(devices=jax.devices()[:1])
    options = {"dtype": jnp.float32} if is_release(args.model) else {}
    model = open_bundle(args.model, mesh, **options)
    steps = args.steps or model.defaults["steps"]
    scale = model.defaults["guidance_scale"]
    requests = [Request(x, seed=i, sound=False) for i, x in enumerate(args.prompts)]
    plain = Generator(model, mesh)
    want = by_step(plain, requests, steps, scale)
    kinds = {"bfloat16": Generator(in_bfloat16(model), mesh)}
    kinds |= {form: Generator(model, mesh, quantize=form) for form in FORMS}
    found = {
        name: errors(by_step(generator, requests, steps, scale), want)
        for name, generator in kinds.items()
    }
    table = Table("step", *found, title="largest difference / largest value")
    for step in range(steps):
        told = (f"{100 * x[step]:.2f} %" for x in found.values())
        table.add_row(str(step + 1), *told)
    Console().print(table)
    for generator in (plain, *[kinds[form] for form in FORMS]):
        print(generator.room.told)


if __name__ == "__main__":
    with told_in_a_line("stopped."):
        main()
