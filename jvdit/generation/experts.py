"""The denoising networks of a model, one after the other over the noise levels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.reuse import Reuse
from jvdit.generation.residence import Residence
from jvdit.generation.sampling import (
    Chunk,
    OnStep,
    Start,
    Stepper,
    start_noise,
    texts_of,
)
from jvdit.machine.cluster import to_host
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
        *,
        guidances: Mapping[str, Guidance],
        on_step: OnStep | None,
        reuse: Reuse | None,
    ) -> np.ndarray:
        """Denoises a batch to t = 0, one expert after the other."""
        start = start._replace(
            one_clip=batch.one_clip, given=batch.given, kinds=batch.kinds
        )
        places, running = rows_sharding(self.mesh, len(batch.seeds)), None
        for name, span in self.spans(start.steps).items():
            with jax.set_mesh(self.mesh):
                variables = self.variables(name)
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

    def variables(self, name: str) -> dict[str, Any]:
        """The parameters of an expert, and its adapters if it has any."""
        variables = {"params": self.params[name]}
        if (lora := self.model.adapters.get(name)) is not None:
            places = parameter_shardings(lora, self.mesh)
            variables["lora"] = jax.device_put(lora, places)
        return variables

    def spans(self, steps: int) -> dict[str, tuple[int, int]]:
        """The range of steps that each expert takes."""
        model = self.model
        times = model.policy.times(steps, jnp.ones(1), model.path.timesteps)
        shown = model.path.shown(np.asarray(times)[:-1, 0])
        high = int((shown >= np.float32(model.boundary)).sum())
        spans = {"dit": (0, high), "dit_low": (high, steps)}
        return {name: span for name, span in spans.items() if span[0] < span[1]}
