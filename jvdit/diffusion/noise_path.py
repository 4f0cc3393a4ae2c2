"""Noise paths, prediction targets, and timestep schedules for training and sampling.

A path mixes data and noise, `x_t = alpha(t) x0 + sigma(t) noise`. Its *velocity* is
the derivative along its own clock: t itself for flow matching, the angle
`atan2(sigma, alpha)` for the variance-preserving (DDPM) paths, whose velocity is the
v-prediction of arXiv:2202.00512. Measured so, `(x_t, velocity)` is a rotation-like
image of `(x0, noise)` with determinant 1 on every path and at every t, which makes
velocity the one well-conditioned currency that losses and solvers share.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jvdit.ranges import check_ranges

SCHEDULES = ("flow", "linear", "cosine")
TARGETS = ("velocity", "noise", "x0")
DISTRIBUTIONS = ("uniform", "logit_normal")

Values = Float[Array, "..."]  # latents; times that broadcast against them
Times = Float[Array, "*shape"]

_SMALLEST = 1e-4  # least alpha or sigma to divide by


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` (={value!r}) is unknown; choose one of {known}.")


@dataclasses.dataclass(frozen=True)
class NoisePath:
    """A path from data (t = 0) to noise (t = 1), and what the network predicts on it.

    Attributes:
        schedule: "flow" (alpha = 1 - t, sigma = t; Eq. 20 of arXiv:2210.02747 with
            time reversed), "linear" (DDPM's linear beta from 0.1 to 20 in continuous
            time, arXiv:2011.13456 App. C) or "cosine" (arXiv:2102.09672, Eq. 17).
        target: what the network predicts: "velocity" (flow matching, v), "noise"
            (epsilon) or "x0".
        timesteps: how many discrete timesteps the network was trained on, such as
            Wan's 1000: t is rounded down to one of them before the network sees it.
            0: the network takes any t.

    Raises:
        ValueError: schedule or target is unknown.
    """

    schedule: str = "flow"
    target: str = "velocity"
    timesteps: int = 0

    def __post_init__(self):
        _check("schedule", self.schedule, SCHEDULES)
        _check("target", self.target, TARGETS)

    def alpha_sigma(self, t: Times) -> tuple[Times, Times]:
        """The weights alpha of the data and sigma of the noise at time t."""
        if self.schedule == "flow":
            return 1.0 - t, t
        if self.schedule == "linear":
            log_alpha = -0.25 * t**2 * (20.0 - 0.1) - 0.5 * t * 0.1
            return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
        # The offset keeps sigma's slope finite at 0; the last 0.2 % are left out
        # because alpha = 0 there would leave nothing of the data to predict.
        start, end = 0.008, 0.998
        angle = (t * end + start) / (1 + start) * (math.pi / 2)
        first = math.cos(start / (1 + start) * math.pi / 2)
        alpha = jnp.minimum(jnp.cos(angle) / first, 1.0)
        return alpha, jnp.sqrt(jnp.maximum(1 - alpha**2, 0.0))

    def shown(self, t: Float[Any, "*shape"]) -> Float[Any, "*shape"]:
        """The time that the network is given at time t: t, or the timestep below it.

        Works on arrays of numpy and of JAX.
        """
        if not self.timesteps:
            return t
        return t * self.timesteps // 1 / self.timesteps

    def clock(self, t: Times) -> Times:
        """The variable in which `velocity` is the derivative of x_t."""
        if self.schedule == "flow":
            return t
        alpha, sigma = self.alpha_sigma(t)
        return jnp.arctan2(sigma, alpha)

    def _slopes(self, alpha, sigma):
        if self.schedule == "flow":
            return -jnp.ones_like(alpha), jnp.ones_like(sigma)
        return -sigma, alpha

    def mix(self, x0: Values, noise: Values, t: Values) -> Values:
        """Adds noise: x_t = alpha(t) x0 + sigma(t) noise; t broadcasts against x0."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def true_velocity(self, x0: Values, noise: Values, t: Values) -> Values:
        """The velocity of the conditional path through x0 and noise: the target."""
        alpha_slope, sigma_slope = self._slopes(*self.alpha_sigma(t))
        return alpha_slope * x0 + sigma_slope * noise

    def velocity(self, output: Values, x: Values, t: Values) -> Values:
        """Converts the network's prediction at x_t (velocity, noise or x0) to velocity.

        Args:
            output: the network's prediction of `target`.
            x: the noisy x_t.
            t: the time, 0 (data) to 1 (noise).
        """
        if self.target == "velocity":
            return output
        alpha, sigma = self.alpha_sigma(t)
        alpha_slope, sigma_slope = self._slopes(alpha, sigma)
        if self.target == "noise":
            return (output + alpha_slope * x) / jnp.maximum(alpha, _SMALLEST)
        return (sigma_slope * x - output) / jnp.maximum(sigma, _SMALLEST)

    def x0_noise(self, velocity: Values, x: Values, t: Values) -> tuple[Values, Values]:
        """Converts a velocity at x_t to the predicted (x0, noise)."""
        alpha, sigma = self.alpha_sigma(t)
        alpha_slope, sigma_slope = self._slopes(alpha, sigma)
        return sigma_slope * x - sigma * velocity, alpha * velocity - alpha_slope * x

    def loss_weight(self, t: Times) -> Times:
        """Factor from the squared error of the velocity to that of the target."""
        alpha, sigma = self.alpha_sigma(t)
        return {"velocity": jnp.ones_like(t), "noise": alpha**2, "x0": sigma**2}[
            self.target
        ]


@dataclasses.dataclass(frozen=True)
class TimestepPolicy:
    """The timesteps of training and of sampling: one policy for both.

    Larger clips stay recognisable up to higher noise levels, so their timesteps are
    shifted towards 1 by `t -> s t / (1 + (s - 1) t)` (Eq. 23, arXiv:2403.03206), with
    `s = shift * sqrt(tokens / shift_tokens)` clipped to `shift_range`.

    Attributes:
        distribution: distribution of training timesteps before the shift, "uniform" or
            "logit_normal".
        mean, std: mean and standard deviation of the logit, for "logit_normal".
        shift: the shift s of a clip of `shift_tokens` tokens.
        shift_tokens: the token count that `shift` was chosen for. None: every clip has
            the same shift.
        shift_range: smallest and largest s.
        sound_shift: how many times larger s is for a sound than for a picture: what is
            heard when is decided at more noise than what is seen where.
        span: training timesteps lie between these two; with two experts, the part of
            one of them.
        grid: sampling starts from the first of these, after the shift; the second is
            where even spacing ends, before the shift. The last time is always 0. Wan's
            is (1 - 1e-6, 0.001).
        start: where the even spacing begins, before the shift.
        reach_end: True puts one time at the end of the spacing, and the last step goes
            from there to 0; False puts 0 in the place of that end.
        levels: the times of sampling themselves, without the 0 at the end, in the place
            of any spacing; (): they are spaced.

    Raises:
        ValueError: unknown distribution, shift not positive or outside its range,
            `span` not in order inside [0, 1], or `levels` not falling inside (0, 1].
    """

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    shift_tokens: int | None = None
    shift_range: tuple[float, float] = (1.0, 12.0)
    sound_shift: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)
    grid: tuple[float, float] = (1.0, 0.0)
    start: float = 1.0
    reach_end: bool = False
    levels: tuple[float, ...] = ()

    def __post_init__(self):
        falling = all(a > b for a, b in itertools.pairwise((*self.levels, 0.0)))
        if self.levels and not (falling and self.levels[0] <= 1):
            raise ValueError(
                f"`levels` (={self.levels}) must fall from at most 1, and end above 0; "
                "timesteps are divided by 1000."
            )
        _check("distribution", self.distribution, DISTRIBUTIONS)
        check_ranges({"sound_shift": self.sound_shift}, "timesteps.")
        low, high = self.shift_range
        if not 0 < low <= self.shift <= high:
            raise ValueError(
                f"`shift` (={self.shift}) must lie inside `shift_range` (={low}, "
                f"{high}), above 0; widen the range or move the shift."
            )
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"`span` (={self.span}) must lie in order inside [0, 1].")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "TimestepPolicy":
        """Builds a policy from JSON values or a config, where tuples are lists."""
        pairs = ("shift_range", "span", "grid", "levels")
        given = {k: tuple(settings[k]) for k in pairs if k in settings}
        return cls(**{**settings, **given})

    @property
    def of_sound(self) -> "TimestepPolicy":
        """The same policy for sounds by themselves."""
        low, high = (x * self.sound_shift for x in self.shift_range)
        return dataclasses.replace(
            self,
            shift=self.shift * self.sound_shift,
            shift_range=(low, high),
            sound_shift=1.0,
        )

    def sound_times(self, t: Float[Any, "*shape"]) -> Float[Any, "*shape"]:
        """The times of a sound that is made along with a picture at these times.

        Works on arrays of numpy and of JAX.
        """
        return _shifted(t, self.sound_shift)

    def shift_for(self, num_tokens: Times) -> Times:
        """The shift s of clips with this many tokens."""
        if self.shift_tokens is None:
            return jnp.full_like(num_tokens, self.shift)
        s = self.shift * jnp.sqrt(num_tokens / self.shift_tokens)
        return jnp.clip(s, *self.shift_range)

    def shifted(self, t: Times, num_tokens: Times) -> Times:
        """Shifts times of clips of `num_tokens` tokens towards 1."""
        return _shifted(t, self.shift_for(num_tokens))

    def shifted_levels(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Noise levels of a clip of `shift_tokens` tokens, shifted, for `levels`."""
        return tuple(_shifted(level, self.shift) for level in levels)

    def quantile(self, u: Times, num_tokens: Times) -> Times:
        """The quantile function of training timesteps: u in [0, 1] to t."""
        if self.span != (0.0, 1.0):
            low, high = (self._share_below(t, num_tokens) for t in self.span)
            u = low + u * (high - low)
        if self.distribution == "logit_normal":
            u = jnp.clip(u, 1e-6, 1 - 1e-6)
            u = jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))
        return self.shifted(u, num_tokens)

    def _share_below(self, t: float, num_tokens: Times) -> Times:
        """The cumulative distribution at t, before timesteps are limited to `span`."""
        s = self.shift_for(num_tokens)
        plain = jnp.clip(t / (s - (s - 1) * t), 1e-6, 1 - 1e-6)
        if self.distribution == "uniform":
            return plain
        logit = jnp.log(plain / (1 - plain))
        return jax.scipy.special.ndtr((logit - self.mean) / self.std)

    def sample(self, key: PRNGKeyArray, num_tokens: Times) -> Times:
        """Draws one training timestep for each clip.

        The draws are stratified: n clips take one time from each n-th of the
        distribution, which lowers the variance of the loss (arXiv:2107.00630, I.1).
        """
        order_key, jitter_key = jax.random.split(key)
        count = num_tokens.size
        u = jnp.arange(count) + jax.random.uniform(jitter_key)
        u = jax.random.permutation(order_key, u / count)
        return self.quantile(u.reshape(num_tokens.shape), num_tokens)

    def times(
        self, steps: int, num_tokens: Times, timesteps: int = 0
    ) -> Float[Array, "times *shape"]:
        """The `steps + 1` times of a solver, from 1 down to 0.

        Args:
            steps: how many steps the solver takes.
            num_tokens: how many tokens each clip has.
            timesteps: `NoisePath.timesteps`. Where all clips have one shift, rounding
                to float32 then never changes which timestep the network is given.

        Raises:
            ValueError: `steps` is not positive, or not the number of `levels`.
        """
        shape = (steps + 1, *num_tokens.shape)
        even = self.even(steps, timesteps)
        t = jnp.asarray(even).reshape(-1, *(1 for _ in shape[1:]))
        return self.sized(*(jnp.broadcast_to(x, shape) for x in (t, num_tokens[None])))

    def even(self, steps: int, timesteps: int = 0) -> Float[np.ndarray, " times"]:
        """The times of a solver before what depends on the size of a clip (`sized`).

        Args:
            steps: how many steps the solver takes.
            timesteps: as for `times`.

        Raises:
            ValueError: as for `times`.
        """
        if steps < 1:
            raise ValueError(f"`steps` (={steps}) must be at least 1; try 30.")
        if self.levels:
            if steps != len(self.levels):
                raise ValueError(
                    f"`steps` (={steps}) must be {len(self.levels)}, one for each of "
                    f"`levels` (={self.levels}); leave it out."
                )
            return np.asarray([*self.levels, 0.0], np.float32)
        first, end = self.grid
        even = np.linspace(self.start, end, steps + (not self.reach_end))
        even = np.append(even[:steps], 0.0)
        if self.shift_tokens is None:
            even = np.minimum(_shifted(even, self.shift), first)
            even = _rounded(even, timesteps)
        return even.astype(np.float32)

    def sized(self, t: Times, num_tokens: Times) -> Times:
        """Times from `even`, shifted as suits clips of this many tokens."""
        if self.levels or self.shift_tokens is None:
            return t
        return jnp.minimum(self.shifted(t, num_tokens), self.grid[0])


def _shifted(t: Any, s: Any) -> Any:
    return s * t / (1 + (s - 1) * t)


def _rounded(
    t: Float[np.ndarray, " times"], timesteps: int
) -> Float[np.ndarray, " times"]:
    """Rounds to float32, and nudges by an ulp where that would change the timestep."""
    rounded = t.astype(np.float32)
    wanted = np.floor(t * timesteps).astype(np.float32)
    while (wrong := wanted - np.floor(rounded * timesteps)).any():
        rounded = np.where(wrong, np.nextafter(rounded, np.sign(wrong)), rounded)
    return rounded
