"""The one call of the network, shared by training, sampling and evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvdit.diffusion.noise_path import NoisePath
from jvdit.ranges import check_ranges
from jvdit.shapes import Text, Tokens, apart

# model(tokens, t, text) -> velocity, noise or x0 of every token: `NoisePath.target`.
Model = Callable[[Tokens, Float[Array, "b g"], Text], Float[Array, "b n c"]]
# denoiser(tokens, t) -> velocity of every token; text and guidance are built in.
Denoiser = Callable[[Tokens, Float[Array, "b g"]], Float[Array, "b n c"]]

# As settings have them: for the text of pictures and sounds, and for being in step.
_SCALES = "guidance_scale", "sound_guidance_scale", "sync_scale", "sound_sync_scale"
_CONTROL = "control_guidance_scale"


def denoise(
    model: Model, tokens: Tokens, t: Float[Array, "b g"], text: Text, path: NoisePath
) -> Float[Array, "b n c"]:
    """Predicts the velocity of noisy tokens, in float32.

    Args:
        model: the network, for example `functools.partial(dit.apply, {"params":
            params})`.
        tokens: the noisy tokens; `tokens.latents` is x_t.
        t: the noise levels of each row, 0 (data) to 1 (noise); `tokens.level` says
            which of them each token is at.
        text: text states; each token attends to those of its own clip.
        path: the noise path on which the tokens were noised.
    """
    output = model(tokens, path.shown(t), text).astype(jnp.float32)
    return path.velocity(output, tokens.latents, tokens.per_token(t))


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv:2207.12598), of each kind by its own scales.

    Attributes:
        scale: 1 turns guidance by the text off, with one network evaluation a step;
            larger values extrapolate away from the null text, with two.
        interval: guide only while t is between these two (arXiv:2404.07724).
        rescale: 0 to 1, how far to bring the standard deviation of each clip's
            predicted x0 back to what it is without guidance (arXiv:2305.08891, 3.4).
        sound_scale: `scale` of sounds; None: the same.
        sync: scales of pictures and of sounds for being in step: 1 turns it off; larger
            values extrapolate away from what either kind would be without the other,
            with one more evaluation.
        control: scale for the channels beside the noise, such as edges: 1 turns it off;
            larger values extrapolate away from what the clip would be without, with
            one more evaluation.

    Raises:
        ValueError: a scale is negative, or the interval or rescale leave [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    sound_scale: float | None = None
    sync: tuple[float, float] = (1.0, 1.0)
    control: float = 1.0

    def __post_init__(self):
        scales = self.scale, self.sound_scale, *self.sync
        check_ranges(dict(zip(_SCALES, scales, strict=True)) | {_CONTROL: self.control})
        check_ranges(
            {"guidance_interval": self.interval, "guidance_rescale": self.rescale}
        )
        low, high = self.interval
        if low > high:
            raise ValueError(f"`guidance_interval` (={low}, {high}) must be in order.")

    @property
    def text(self) -> tuple[float, float]:
        """Scales for the text, of pictures and of sounds."""
        return self.scale, self.scale if self.sound_scale is None else self.sound_scale

    def evaluations(self, kinds: int = 1) -> int:
        """How many times as many rows the network is given, for so many kinds."""
        by_text = any(scale != 1 for scale in self.text[:kinds])
        in_step = kinds > 1 and self.sync != (1.0, 1.0)
        return 1 + by_text + in_step + (self.control != 1)


def guided(
    model: Model,
    text: Text,
    null_text: Text,
    path: NoisePath,
    guidance: Guidance,
    scales: Float[Array, "b g"] | None = None,
) -> Denoiser:
    """Builds a denoiser with classifier-free guidance.

    One evaluation of several times the rows predicts all velocities.

    Args:
        model: the network.
        text: text states of the prompts.
        null_text: text states of the empty or negative prompts.
        path: the noise path that the network was trained on.
        guidance: scales, interval and rescale.
        scales: of the text for each noise level, in the place of the guidance's, if
            that guides by the text at all.
    """

    def denoiser(tokens: Tokens, t: Float[Array, "b g"]) -> Float[Array, "b n c"]:
        kinds = len(tokens.kinds) or 1
        # What to extrapolate away from: by which scales, tokens, text.
        away: list[tuple[Any, Tokens, Text]] = []
        if any(scale != 1 for scale in guidance.text[:kinds]):
            away.append(
                (guidance.text if scales is None else scales, tokens, null_text)
            )
        if guidance.control != 1:
            away.append(((guidance.control,) * 2, _without_channels(tokens), text))
        passes = [(tokens, text), *(x[1:] for x in away)]
        if kinds > 1 and guidance.sync != (1.0, 1.0):
            nobody = jnp.zeros((len(t), t.shape[1] // kinds - 1), bool)
            passes = [apart(*each, nobody) for each in passes]
            away.append((guidance.sync, *apart(tokens, text)))
            passes.append(away[-1][1:])
        rows = jax.tree.map(lambda *x: jnp.concatenate(x), *passes)
        times = jnp.concatenate([t] * len(passes))
        made = denoise(model, rows[0], times, rows[1], path)
        with_text, *others = jnp.split(made, len(passes))
        velocity = with_text
        for (scale, _, _), other in zip(away, others, strict=True):
            scale = _spread(scale, tokens, t, guidance.interval)
            velocity += (scale - 1) * (with_text - other)
        if guidance.rescale == 0 or not away:
            return velocity
        return _rescaled(velocity, with_text, tokens, t, path, guidance.rescale)

    return denoiser


def _spread(
    scale: tuple[float, float] | Float[Array, "b g"],
    tokens: Tokens,
    t: Float[Array, "b g"],
    interval: tuple[float, float],
) -> Float[Array, "b #n 1"]:
    """The scale of each token, given by kind or by level: 1 outside of the interval."""
    if isinstance(scale, tuple):
        kinds = len(tokens.kinds) or 1
        scale = jnp.asarray(scale[:kinds]).repeat(t.shape[1] // kinds)[None]
    low, high = interval
    return tokens.per_token(jnp.where((t >= low) & (t <= high), scale, 1.0))


def _without_channels(tokens: Tokens) -> Tokens:
    """The tokens with nothing in the channels beside the noise."""
    cond = None if tokens.cond is None else jnp.zeros_like(tokens.cond)
    return dataclasses.replace(tokens, cond=cond)


def _rescaled(velocity, with_text, tokens, t, path, rescale):
    level_t = tokens.per_token(t)
    x0, noise = path.x0_noise(velocity, tokens.latents, level_t)
    plain, _ = path.x0_noise(with_text, tokens.latents, level_t)
    ratio = clip_std(plain, tokens, t.shape[1]) / clip_std(x0, tokens, t.shape[1])
    wanted = x0 * tokens.per_token(1 - rescale + rescale * ratio)
    # With x_t fixed, the new x0 determines the noise, and both the velocity.
    alpha, sigma = path.alpha_sigma(level_t)
    noise = jnp.where(
        sigma > 0, (tokens.latents - alpha * wanted) / jnp.maximum(sigma, 1e-4), noise
    )
    return path.true_velocity(wanted, noise, level_t)


def clip_std(
    x: Float[Array, "b n c"], tokens: Tokens, levels: int
) -> Float[Array, "b {levels}"]:
    """Standard deviation over the tokens at each noise level, so of each clip."""
    if tokens.level is None:
        return jnp.std(x, axis=(1, 2))[:, None] + 1e-6
    member = jax.nn.one_hot(tokens.level, levels)
    count = jnp.maximum(member.sum(1), 1) * x.shape[-1]
    mean = jnp.einsum("bnc,bng->bg", x, member) / count
    square = jnp.einsum("bnc,bng->bg", x**2, member) / count
    return jnp.sqrt(jnp.maximum(square - mean**2, 0)) + 1e-6
