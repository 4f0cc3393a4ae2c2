"""The compiled programs of packed rows: clips begin, and all take a step."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvdit.diffusion.denoise import Guidance, guided
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.solvers import Now, Solution, advance_each, begin, clip_noise
from jvdit.machine.compilation import jit
from jvdit.models.backbones import Backbone
from jvdit.shapes import Text, Tokens


class Denoising(NamedTuple):
    """What is compiled into the programs of a row.

    Attributes:
        dit: the network.
        path: noise path.
        solver: a name in `SOLVERS`.
        guidance: with the scale of the text for each clip in its place.
        kinds: how many tokens of a row are of each kind.
    """

    dit: Backbone
    path: NoisePath
    solver: str
    guidance: Guidance
    kinds: tuple[int, ...]


@partial(jit, static_argnums=0)
def sized(policy: TimestepPolicy, even: Array, counts: Array) -> Array:
    """Evenly spaced timesteps as those of clips of so many tokens."""
    return policy.sized(even, counts)


def _keys(seeds: Array) -> Array:
    return jax.vmap(jax.vmap(jax.random.key))(seeds)


def _tokens(how: Denoising, arrays: Mapping[str, Array], latents: Array) -> Tokens:
    return Tokens.of(arrays, latents, kinds=how.kinds)


@partial(jit, static_argnums=0)
def begun(how: Denoising, arrays: Mapping[str, Array], seeds: Array) -> Any:
    """Latents and the solver's state of empty rows."""
    times = jnp.zeros((1, *seeds.shape))
    solution = begin(_tokens(how, arrays, arrays["latents"]), times, how.solver)
    return solution.tokens.latents, solution.state


@partial(jit, static_argnums=0)
def entered(
    how: Denoising,
    solution: Any,
    arrays: Mapping[str, Array],
    seeds: Array,
    fresh: Array,
    drawn: Array,
    fresh_level: Array,
) -> Any:
    """The solution after a clip entered: noise, and nothing that the solver keeps.

    Args:
        how: to denoise.
        solution: before.
        arrays: of the rows; what isn't drawn begins as it is there.
        seeds: of the noise, for each level.
        fresh: tokens of the clip.
        drawn: those of them whose noise is drawn.
        fresh_level: its levels.
    """
    latents, state = solution
    tokens = _tokens(how, arrays, arrays["latents"])
    noise = clip_noise(_keys(seeds), tokens)
    noisy = jnp.where(drawn[..., None], noise, arrays["latents"])

    def cleared(kept: Array) -> Array:
        new = fresh[..., None] if kept.ndim == 3 else fresh_level
        return jnp.where(new, 0.0, kept)

    latents = jnp.where(fresh[..., None], noisy, latents)
    return latents, jax.tree.map(cleared, state)


@partial(jit, static_argnums=0)
def stepped(
    how: Denoising,
    variables: Any,
    solution: Any,
    arrays: Mapping[str, Array],
    texts: Any,
    index: Array,
    steps: Array,
    t: Float[Array, "b g"],
    t_next: Float[Array, "b g"],
    scales: Float[Array, "b g"],
    seeds: Array,
) -> Any:
    """The solution after a step of every clip, and the tokens that aren't finite."""
    latents, state = solution
    model = partial(how.dit.apply, variables)
    text, null = (Text(*each) for each in texts)
    denoiser = guided(model, text, null, how.path, how.guidance, scales)
    now = Now(index, steps, t, t_next, how.path, _keys(seeds))
    tokens = _tokens(how, arrays, latents)
    moved = advance_each(denoiser, Solution(tokens, state), now, how.solver)
    # What isn't finite in one clip would reach others through sums with zeros.
    latents, state = moved.tokens.latents, moved.state
    broken = ~jnp.isfinite(latents).all(axis=-1)
    tame = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)  # noqa: E731
    return jax.tree.map(tame, (latents, state)), broken
