"""Solvers: from noise at t = 1 to data at t = 0 in a given number of steps.

A solver is a function of one step, `step(denoiser, x, now, state) -> (x, state)`,
listed in `SOLVERS`. `advance` runs it over steps in one `lax.scan`; `advance_each`
takes one step, of which each clip may be at another. Each noise level
of a row has its own times, so clips of any size, each with its own shift, are denoised
together; a level that stays at t = 0 (clean tokens, padding) is left untouched.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jvdit.diffusion.denoise import Denoiser
from jvdit.diffusion.noise_path import NoisePath
from jvdit.diffusion.reuse import Memory
from jvdit.shapes import Tokens


class Now(NamedTuple):
    """What a solver step is given besides x and the solver's own state.

    Attributes:
        index: number of the step, from 0; perhaps one for each noise level.
        steps: how many steps there are in all; likewise.
        t: time of each noise level before the step.
        t_next: time of each noise level after the step.
        path: the noise path that the network was trained on.
        keys: random key for each noise level at this step.
    """

    index: Int[Array, "*b g"]
    steps: int | Int[Array, "b g"]
    t: Float[Array, "b g"]
    t_next: Float[Array, "b g"]
    path: NoisePath
    keys: Key[Array, "b g"]

    @property
    def first(self):
        """Whether this is the first step."""
        return self.index == 0

    @property
    def last(self):
        """Whether this step ends at t = 0."""
        return self.index == self.steps - 1


Step = Callable[[Denoiser, Tokens, Now, Any], tuple[Float[Array, "b n c"], Any]]


def clip_noise(keys: Key[Array, "b g"], tokens: Tokens) -> Float[Array, "b n c"]:
    """Draws normal noise that depends only on a clip's key and its number of tokens.

    So a clip comes out the same wherever in a batch, and beside whatever, it is packed.
    """
    b, n, c = tokens.latents.shape
    if tokens.level is None:
        level, rank = jnp.zeros((b, n), int), jnp.arange(n)[None].repeat(b, 0)
    else:
        level = tokens.level
        member = jax.nn.one_hot(level, keys.shape[1], dtype=int)
        rank = jnp.take_along_axis(member.cumsum(1) - 1, level[..., None], 2)[..., 0]

    def draw(keys, level, rank):
        return jax.random.normal(jax.random.fold_in(keys[level], rank), (c,))

    return jax.vmap(jax.vmap(draw, (None, 0, 0)))(keys, level, rank)


def _half_log_snr(path: NoisePath, t):
    """Half the log signal-to-noise ratio, finite at both ends."""
    alpha, sigma = path.alpha_sigma(t)
    return jnp.log(jnp.maximum(alpha, 1e-6)) - jnp.log(jnp.maximum(sigma, 1e-6))


def _predict(denoiser, x: Tokens, now: Now):
    velocity = denoiser(x, now.t)
    return now.path.x0_noise(velocity, x.latents, x.per_token(now.t))


def _stride(x: Tokens, now: Now):
    return x.per_token(now.path.clock(now.t_next) - now.path.clock(now.t))


def euler(denoiser, x, now, state):
    """Euler: one step along the velocity; order 1."""
    return x.latents + _stride(x, now) * denoiser(x, now.t), state


def heun(denoiser, x, now, state):
    """Heun: an Euler step, redone with the mean of both ends' velocities; order 2.

    Two evaluations a step, one in the last (Algorithm 1, arXiv:2206.00364).
    """
    stride, velocity = _stride(x, now), denoiser(x, now.t)
    ahead = x.latents + stride * velocity

    def correct(ahead):
        end = denoiser(x.with_latents(ahead), now.t_next)
        return x.latents + stride * (velocity + end) / 2

    return jax.lax.cond(now.last, lambda ahead: ahead, correct, ahead), state


def ddim(denoiser, x, now, state):
    """DDIM: mixes the predicted data and noise again at the next time; order 1.

    Eq. 12 of arXiv:2010.02502 with eta = 0.
    """
    x0, noise = _predict(denoiser, x, now)
    return now.path.mix(x0, noise, x.per_token(now.t_next)), state


def renoise(denoiser, x, now, state):
    """Predicts the data, and adds fresh noise of the next level to it.

    For models distilled to few steps: multistep consistency sampling, Algorithm 1 of
    arXiv:2303.01469, and DMD2 (arXiv:2405.14867).
    """
    x0, _ = _predict(denoiser, x, now)
    noise = clip_noise(now.keys, x)
    return now.path.mix(x0, noise, x.per_token(now.t_next)), state


def ancestral(denoiser, x, now, state):
    """DDPM's ancestral sampler: draws from the posterior q(x_next | x_t, x0).

    Eqs. 6-7 of arXiv:2006.11239, for any alpha and sigma (Eq. 31, arXiv:2107.00630).
    """
    x0, _ = _predict(denoiser, x, now)
    alpha, sigma = now.path.alpha_sigma(now.t)
    alpha_next, sigma_next = now.path.alpha_sigma(now.t_next)
    ratio = alpha / jnp.maximum(alpha_next, 1e-6)
    variance = jnp.maximum(sigma, 1e-6) ** 2
    added = jnp.maximum(variance - (ratio * sigma_next) ** 2, 0)
    keep = x.per_token(ratio * sigma_next**2 / variance)
    take = x.per_token(alpha_next * added / variance)
    spread = x.per_token(jnp.sqrt(added) * sigma_next / jnp.sqrt(variance))
    noise = clip_noise(now.keys, x)
    return keep * x.latents + take * x0 + spread * noise, state


def dpmpp_2m(denoiser, x, now, state):
    """DPM-Solver++(2M): extrapolates the data prediction of two steps; order 2.

    Algorithm 2 of arXiv:2211.01095; the first and last steps are of order 1.
    """
    x0, _ = _predict(denoiser, x, now)
    lambda_now = _half_log_snr(now.path, now.t)
    h = _half_log_snr(now.path, now.t_next) - lambda_now
    ratio = _divide(lambda_now - state["t_lambda"], h)
    weight = jnp.where(now.first | now.last, 0.0, _divide(0.5, ratio))
    weight = x.per_token(weight)
    data = (1 + weight) * x0 - weight * state["x0"]
    state = {"x0": x0, "t_lambda": lambda_now}
    return _exponential_step(x, data, now.t, now.t_next, now.path), state


def unipc(denoiser, x, now, state):
    """UniPC, order 2, B(h) = expm1(-h), predicting data.

    Algorithms 1-2 of arXiv:2302.04867: each evaluation first corrects the step that
    led to it, then predicts the next; the last step is of order 1.
    """
    corrected, x0 = _unipc_correct(denoiser, x, now, state)
    x = x.with_latents(corrected)
    lambda_now = _half_log_snr(now.path, now.t)
    h = _half_log_snr(now.path, now.t_next) - lambda_now
    last_lambda = state["t_lambda"]
    weight = jnp.where(
        now.first | now.last, 0.0, 0.5 * _divide(h, last_lambda - lambda_now)
    )
    alpha, _ = now.path.alpha_sigma(now.t_next)
    curve = x.per_token(weight * alpha * jnp.expm1(-h)) * (state["x0"] - x0)
    ahead = _exponential_step(x, x0, now.t, now.t_next, now.path) - curve
    state = {
        "x": corrected,
        "x0": x0,
        "earlier_x0": state["x0"],
        "t": now.t,
        "t_lambda": lambda_now,
        "earlier_lambda": last_lambda,
    }
    return ahead, state


def _unipc_correct(denoiser, x, now, state):
    x0, _ = _predict(denoiser, x, now)
    lambda_now = _half_log_snr(now.path, now.t)
    h = lambda_now - state["t_lambda"]
    r = _divide(state["earlier_lambda"] - state["t_lambda"], h)
    phi_1 = jnp.expm1(-h)
    b1 = _divide(_divide(phi_1, -h) - 1, phi_1)
    b2 = 2 * _divide(_divide(_divide(phi_1, -h) - 1, -h) - 0.5, phi_1)
    second_order = now.index >= 2
    older = jnp.where(second_order, _divide(b1 - b2, 1 - r), 0.0)
    newer = jnp.where(second_order, b1 - older, 0.5)
    older = _divide(older, r)
    curve = x.per_token(older) * (state["earlier_x0"] - state["x0"])
    curve += x.per_token(newer) * (x0 - state["x0"])
    alpha, _ = now.path.alpha_sigma(now.t)
    start = x.with_latents(state["x"])
    corrected = _exponential_step(start, state["x0"], state["t"], now.t, now.path)
    corrected -= x.per_token(alpha * phi_1) * curve
    still = x.per_token(jnp.where(now.first, 0.0, now.t)) == 0
    return jnp.where(still, x.latents, corrected), x0


def _divide(a, b):
    """Divides, giving 0 where b is 0: at noise levels that stay at t = 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))


def _exponential_step(x: Tokens, data, t, t_next, path: NoisePath):
    """The exact step from t to t_next for a data prediction that stays `data`."""
    alpha, sigma = path.alpha_sigma(t)
    alpha_next, sigma_next = path.alpha_sigma(t_next)
    ratio = _divide(sigma_next, sigma)
    keep = x.per_token(ratio)
    return keep * x.latents + x.per_token(alpha_next - alpha * ratio) * data


def _fold(keys, index):
    index = jnp.broadcast_to(index, keys.shape)
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, index)


_UNIPC = ("x", "x0", "earlier_x0"), ("t", "t_lambda", "earlier_lambda")

# name -> (step, what it keeps of each token, what it keeps of each noise level)
SOLVERS: dict[str, tuple[Step, Sequence[str], Sequence[str]]] = {
    "euler": (euler, (), ()),
    "heun": (heun, (), ()),
    "ddim": (ddim, (), ()),
    "dpmpp_2m": (dpmpp_2m, ("x0",), ("t_lambda",)),
    "unipc": (unipc, *_UNIPC),
    "ancestral": (ancestral, (), ()),
    "renoise": (renoise, (), ()),
}


def check_solver(name: str) -> str:
    """Returns the name, or raises a ValueError that lists the known solvers."""
    if name not in SOLVERS:
        raise ValueError(f"`solver` (={name!r}) is unknown; choose one of {[*SOLVERS]}")
    return name


class Solution(NamedTuple):
    """A solver part of the way from noise to data.

    Attributes:
        tokens: the tokens with their current latents.
        state: what the solver keeps from step to step.
    """

    tokens: Tokens
    state: Any


def begin(
    tokens: Tokens, times: Float[Array, "times b g"], solver: str = "unipc"
) -> Solution:
    """The solution before the first step: noise, and the solver's initial state.

    Args:
        tokens: `latents` is noise where tokens are generated, data where given.
        times: the times of each noise level, from 1 down to 0.
        solver: a name in `SOLVERS`.

    Raises:
        ValueError: the solver is unknown.
    """
    _, *kept = SOLVERS[check_solver(solver)]
    tokens = tokens.with_latents(tokens.latents.astype(jnp.float32))
    state = {
        name: jnp.zeros_like(like)
        for names, like in zip(kept, (tokens.latents, times[0]), strict=True)
        for name in names
    }
    return Solution(tokens, state)


def advance(
    denoiser: Denoiser,
    solution: Solution,
    times: Float[Array, "times b g"],
    path: NoisePath,
    keys: Key[Array, "b g"],
    solver: str = "unipc",
    first: int | Int[Array, ""] = 0,
    count: int | None = None,
    memory: Memory | None = None,
) -> Solution:
    """Takes some of the steps of a solution.

    So different experts can take different steps, and a caller can look at each.

    Args:
        denoiser: predicts the velocity at (tokens, t); see `guided`.
        solution: from `begin`, or from an earlier call.
        times: the times of each noise level, from 1 down to 0; a given level is 0
            throughout.
        path: the noise path that the network was trained on.
        keys: a key for each noise level (each clip), for solvers that draw noise.
        solver: a name in `SOLVERS`.
        first: number of the first step to take.
        count: how many steps to take; None: all that remain.
        memory: state that the denoiser keeps from step to step. The solver must then
            evaluate the denoiser exactly once a step.

    Raises:
        ValueError: the solver is unknown.
    """
    step, *_ = SOLVERS[check_solver(solver)]
    steps = times.shape[0] - 1

    def body(carry, now_at):
        (x, state), kept = carry
        index, t, t_next = now_at
        if memory is not None:
            memory.value, memory.index = kept, index
        now = Now(index, steps, t, t_next, path, _fold(keys, index))
        moved = _moved(step, denoiser, Solution(x, state), now)
        kept = None if memory is None else memory.value
        return (moved, kept), None

    count = steps - int(first) if count is None else count
    now_at = [
        jax.lax.dynamic_slice_in_dim(x, first, count)
        for x in (jnp.arange(steps), times[:-1], times[1:])
    ]
    carry = solution, None if memory is None else memory.value
    carry, _ = jax.lax.scan(body, carry, now_at)
    if memory is not None:
        memory.value = carry[1]
    return carry[0]


def _moved(step: Step, denoiser: Denoiser, solution: Solution, now: Now) -> Solution:
    """The solution after a step; noise levels whose time stays are left untouched."""
    x, state = solution
    moved, state = step(denoiser, x, now, state)
    latents = jnp.where(x.per_token(now.t) == x.per_token(now.t_next), x.latents, moved)
    return Solution(x.with_latents(latents), state)


def advance_each(
    denoiser: Denoiser, solution: Solution, now: Now, solver: str = "unipc"
) -> Solution:
    """Takes one step, which may be another one for each noise level.

    So clips that began at different times, and take different numbers of steps, are
    denoised together.

    Args:
        denoiser: predicts the velocity at (tokens, t); see `guided`.
        solution: with the state of `begin` at noise levels whose `index` is 0.
        now: the step of each noise level; `keys` are those of the clips. A level that
            is clean has `t` and `t_next` 0.
        solver: a name in `SOLVERS`, but not "heun", whose last step is another.

    Raises:
        ValueError: the solver is unknown, or "heun".
    """
    step, *_ = SOLVERS[check_solver(solver)]
    if solver == "heun":
        raise ValueError("`solver` (='heun') ends for all clips at once; take 'unipc'.")
    return _moved(
        step, denoiser, solution, now._replace(keys=_fold(now.keys, now.index))
    )
