"""The sampling loop: draws the noise of a batch, and runs solver steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.reuse import COLLECTION, Memory
from jvdit.diffusion.solvers import Solution, advance, begin, clip_noise
from jvdit.machine.cluster import to_host
from jvdit.machine.compilation import jit
from jvdit.models.backbones import Backbone
from jvdit.shapes import Text, Tokens

# on_step(steps done, steps in all, packed latents of the batch)
OnStep = Callable[[int, int, np.ndarray], None]


class Running(NamedTuple):
    """A batch part of the way from noise to data.

    Attributes:
        solution: the latents so far, and the solver's state.
        times: the timesteps, from 1 down to 0, for each noise level of each row.
        keys: random key for each noise level, for solvers that draw noise.
    """

    solution: Solution
    times: Float[Array, "times b g"]
    keys: Key[Array, "b g"]


class Start(NamedTuple):
    """What decides how a batch begins.

    Attributes:
        path: the noise path that the network was trained on.
        policy: spaces the timesteps; larger clips may have a larger shift.
        steps: how many steps the solver takes.
        solver: a name in `SOLVERS`.
        noisy: the batch's pictures already are the initial noise.
        rising: times rise from 0 to 1 instead, from data to noise.
        one_clip: every row is exactly one clip without padding, so no mask is needed.
        given: some tokens may be given (clean).
        kinds: how many tokens of a row are of each kind; (): all clips are silent.
        frames: of every row, if it is one grid and the network asks for them.
    """

    path: NoisePath
    policy: TimestepPolicy
    steps: int
    solver: str
    noisy: bool = False
    rising: bool = False
    one_clip: bool = False
    given: bool = False
    kinds: tuple[int, ...] = ()
    frames: int = 0


@partial(jit, static_argnames="start")
def start_noise(start: Start, arrays: dict[str, Array], seeds: Array) -> Running:
    """Draws the initial noise of a batch, and computes its timesteps.

    Given tokens keep their clean latents.

    Args:
        start: settings.
        arrays: the packed batch, `Chunk.arrays`.
        seeds: noise seed for each noise level, `Chunk.seeds`.
    """
    solver, noisy, given, kinds = start.solver, start.noisy, start.given, start.kinds
    keys = jax.vmap(jax.vmap(jax.random.key))(seeds)
    how = {"one_clip": start.one_clip, "given": given, "kinds": kinds}
    tokens = Tokens.of(arrays, arrays["latents"], frames=start.frames, **how)
    levels = seeds.shape[1] // (len(kinds) or 1)  # of each kind; the first is clean
    times = _times(start, arrays, levels)
    if tokens.level is None:
        times, keys = times[:, :, 1:], keys[:, 1:]
    if start.rising:
        times = times[::-1]
    if not noisy or len(kinds) > 1:
        noise = clip_noise(keys, tokens)
        if given or noisy:
            drawn = (arrays["level"] % levels > 0) | (arrays["segment"] == 0)
            if noisy:
                drawn &= jnp.arange(drawn.shape[1])[None] >= kinds[0]
            noise = jnp.where(drawn[..., None], noise, tokens.latents)
        tokens = tokens.with_latents(noise)
    return Running(begin(tokens, times, solver), times, keys)


def _times(
    start: Start, arrays: dict[str, Array], levels: int
) -> Float[Array, "times b g"]:
    """The timesteps of each noise level of each row, so many for each kind.

    The sound of a clip goes along with its picture (`sound_times`). Where one of them
    is given, the other has the times of its own size.
    """
    path = start.path
    kinds = start.kinds or (arrays["segment"].shape[1],)
    ends = np.cumsum(kinds)[:-1].tolist()
    parts, times = jnp.split(arrays["segment"], ends, axis=1), []
    policies = start.policy, start.policy.of_sound
    for policy, segment in zip(policies, parts, strict=False):
        counts = jax.nn.one_hot(segment, levels).sum(1)
        found = policy.times(start.steps, jnp.maximum(counts, 1.0), path.timesteps)
        times.append(found.at[:, :, 0].set(0.0))
    if len(times) > 1:
        level = jnp.split(arrays["level"], ends, axis=1)[0]
        generated = jax.nn.one_hot(level, levels).sum(1) > 0
        along = start.policy.sound_times(times[0])
        times[1] = jnp.where(generated.at[:, 0].set(False)[None], along, times[1])
    return jnp.concatenate(times, axis=-1)


class Stepper:
    """The compiled solver steps of one network; later calls reuse the compilation.

    Attributes:
        ratios: for each range of steps that was run with `skips`, how much larger the
            blocks' residual was at each step than at the one before.
    """

    def __init__(self, dit: Backbone, path: NoisePath):
        self.dit = dit
        self.ratios: dict[tuple[int, int], np.ndarray] = {}
        self._run = jit(
            partial(self._steps, path),
            static_argnames=("solver", "guidance", "count", "skips"),
        )

    def __call__(
        self,
        variables: PyTree,
        running: Running,
        texts: tuple[Text, Text],
        *,
        span: tuple[int, int],
        on_step: OnStep | None = None,
        skips: tuple[bool, ...] | None = None,
        **settings: Any,
    ) -> Running:
        """Takes the steps from `span[0]` up to, but not including, `span[1]`.

        Args:
            variables: the network's variables: parameters, and adapters if any.
            running: the batch, from `start_noise` or from an earlier call.
            texts: the text and the null text, from `texts_of`.
            span: the first step, and the one after the last.
            on_step: called after each step with the steps done, the steps in all, and
                the packed latents. Without it all steps are one compiled program.
            skips: for each step of the whole solution, whether it reuses the residual
                of the step before instead of running the blocks; None: no reuse.
            **settings: `solver` and `guidance`.
        """
        first, last = span
        count = last - first if on_step is None else 1
        kept = None
        if skips is not None:
            rows, tokens = running.solution.tokens.latents.shape[:2]
            kinds = len(running.solution.tokens.kinds) or 1
            rows *= settings["guidance"].evaluations(kinds)
            residual = jnp.zeros((rows, tokens, self.dit.width), self.dit.dtype)
            kept = residual, jnp.ones(len(skips))
        settings |= {"count": count, "skips": skips}
        for index in range(first, last, count):
            at = np.int32(index)
            running, kept = self._run(variables, running, texts, at, kept, **settings)
            if on_step is not None:
                steps = len(running.times) - 1
                on_step(index + 1, steps, to_host(running.solution.tokens.latents))
        if kept is not None:
            self.ratios[span] = np.asarray(kept[1])
        return running

    def lower(self, variables: Any, running: Any, texts: Any, **settings: Any) -> Any:
        """Lowers the program of some steps without running it, for forecasts.

        Args:
            variables: shapes of the network's variables.
            running: shapes of a batch.
            texts: shapes of the text and the null text.
            **settings: `solver`, `guidance`, `count` and `skips`.
        """
        at = jax.ShapeDtypeStruct((), jnp.int32)
        return self._run.lower(variables, running, texts, at, None, **settings)

    def _steps(
        self,
        path: NoisePath,
        variables: PyTree,
        running: Running,
        texts: tuple[Text, Text],
        first: Array,
        kept: Any,
        *,
        solver: str,
        guidance: Guidance,
        count: int,
        skips: tuple[bool, ...] | None,
    ) -> tuple[Running, Any]:
        solution, times, keys = running
        memory: Any = None if skips is None else Memory()

        def reusing(tokens: Tokens, t: Array, text: Text) -> Array:
            (residual, ratios), i = memory.value, memory.index
            skip = jnp.asarray(skips)[i]
            kept = {"residual": residual, "skip": skip, "ratio": ratios[i]}
            told = {**variables, COLLECTION: kept}
            out, state = self.dit.apply(told, tokens, t, text, mutable=[COLLECTION])
            kept = state[COLLECTION]
            memory.value = kept["residual"], ratios.at[i].set(kept["ratio"])
            return out

        model = partial(self.dit.apply, variables)
        if memory is not None:
            memory.value, model = kept, reusing
        denoiser = guided(model, *texts, path, guidance)
        span = first, count, memory
        solution = advance(denoiser, solution, times, path, keys, solver, *span)
        return Running(solution, times, keys), memory and memory.value
