"""The denoising networks of a model, one after the other over the noise levels."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.reuse import Reuse
from jvdit.generation.batches import Chunk, texts_of
from jvdit.generation.room import Residence
from jvdit.generation.sampling import OnStep, Start, Stepper, start_noise
from jvdit.machine.cluster import to_host
from jvdit.models.lora import A
from jvdit.sharding import parameter_shardings, rows_sharding
from jvdit.weights.bundle import Bundle


@dataclasses.dataclass(frozen=True)
class Experts:
    """Denoises batches with the network, or the two networks, of a model.

    Attributes:
        model: the model.
        params: parameters by network name, on the mesh.
        mesh: the device mesh.
        stepper: the compiled solver steps of the network.
    """

    model: Bundle
    params: Residence
    mesh: Mesh
    stepper: Stepper

    def solved(
        self,
        batch: Chunk,
        start: Start,
        guidances: Mapping[str, Guidance],
        on_step: OnStep | None,
        reuse: Reuse | None,
        conditioning_scale: float | Sequence[float],
    ) -> np.ndarray:
        """Denoises a batch to t = 0, one expert after the other."""
        start = start._replace(
            one_clip=batch.one_clip,
            given=batch.given,
            kinds=batch.kinds,
            frames=batch.frames if self.stepper.dit.patterns else 0,
        )
        places, running = rows_sharding(self.mesh, len(batch.seeds)), None
        for name, span in self.spans(start.steps, start.rising).items():
            with jax.set_mesh(self.mesh):
                variables = self.variables(name, conditioning_scale)
                if running is None:
                    arrays = jax.device_put((batch.arrays, batch.seeds), places)
                    running = start_noise(start, *arrays)
                running = self.stepper(
                    variables,
                    running,
                    texts_of(batch, self.model.pad_text, places),
                    solver=start.solver,
                    guidance=guidances[name],
                    span=span,
                    on_step=on_step,
                    skips=reuse and reuse.skips(start.steps, span[0]),
                )
                # This also waits: the next network needs the memory of this one.
                latents = to_host(running.solution.tokens.latents)
                del variables
        return latents

    def variables(
        self, name: str, conditioning_scale: float | Sequence[float] = 1.0
    ) -> dict[str, Any]:
        """The parameters of an expert, and its adapters if it has any.

        Args:
            name: "dit" or "dit_low".
            conditioning_scale: factors of the hints of control blocks.
        """
        variables = {"params": self.params[name]}
        if (lora := self.model.adapters.get(name)) is not None:
            places = parameter_shardings(lora, self.mesh)
            variables["lora"] = jax.device_put(lora, places)
        if (scales := hint_scales(self.model, conditioning_scale)) is None:
            return variables
        return jax.tree.map_with_path(partial(_scaled_hint, scales), variables)

    def spans(self, steps: int, rising: bool = False) -> dict[str, tuple[int, int]]:
        """The range of steps that each expert takes, in order."""
        model = self.model
        times = model.policy.times(steps, jnp.ones(1), model.path.timesteps)
        shown = model.path.shown(np.asarray(times)[:-1, 0])
        high = int((shown >= np.float32(model.boundary)).sum())
        spans = {"dit": (0, high), "dit_low": (high, steps)}
        if rising:
            spans = {"dit_low": (0, steps - high), "dit": (steps - high, steps)}
        return {name: span for name, span in spans.items() if span[0] < span[1]}


def check_control(model: Bundle, guidance: Guidance) -> None:
    """Raises a ValueError if a model has nothing that guidance by control is about."""
    if guidance.control != 1 and not model.dit.cond_channels:
        raise ValueError(
            f"`control_guidance_scale` (={guidance.control:g}) is for models that are "
            "told something by channels beside the noise, such as edges; leave it out."
        )


def hint_scales(model: Bundle, scale: float | Sequence[float]) -> np.ndarray | None:
    """A factor for the hint of each layer that takes control; None: all are 1.

    Raises:
        ValueError: there are as many neither as one nor as layers, or one isn't finite.
    """
    layers = getattr(model.dit, "control_layers", ())
    found = np.asarray(scale, np.float32).reshape(-1)
    if (found == 1).all() and found.size == 1:
        return None
    if not layers:
        raise ValueError(
            f"`conditioning_scale` (={scale}) is for models that take control (VACE); "
            "leave it out."
        )
    if found.size not in (1, len(layers)) or not np.isfinite(found).all():
        raise ValueError(
            f"`conditioning_scale` (={scale}) must be one finite number, or one for "
            f"each of the {len(layers)} layers that take control (VACE): {[*layers]}."
        )
    return np.broadcast_to(found, (len(layers),))


def _scaled_hint(scales: np.ndarray, path: Any, leaf: jax.Array) -> jax.Array:
    """A parameter times the scale of its hint, if the hint is linear in it."""
    names = [key.key for key in path]
    if names[-2:-1] != ["hint"] or names[-1] == A:
        return leaf
    number = re.fullmatch(r"control_(\d+)", names[1])
    scale = scales.reshape(-1, *(1,) * (leaf.ndim - 1))
    scale = scale if number is None else scales[int(number[1])]
    return (leaf * scale).astype(leaf.dtype)
