"""The one call of the network, shared by training, sampling and evaluation."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jvdit.diffusion.noise_path import NoisePath
from jvdit.shapes import Text, Tokens

# model(tokens, t, text) -> velocity, noise or x0 of every token: `NoisePath.target`.
Model = Callable[[Tokens, Float[Array, "b g"], Text], Float[Array, "b n c"]]
# denoiser(tokens, t) -> velocity of every token; text and guidance are built in.
Denoiser = Callable[[Tokens, Float[Array, "b g"]], Float[Array, "b n c"]]


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
    """Classifier-free guidance (arXiv:2207.12598).

    Attributes:
        scale: 1 turns guidance off, with one network evaluation a step; larger values
            extrapolate away from the null text, with two.
        interval: guide only while t is between these two (arXiv:2404.07724).
        rescale: 0 to 1, how far to bring the standard deviation of each clip's
            predicted x0 back to what it is without guidance (arXiv:2305.08891, 3.4).

    Raises:
        ValueError: the scale is negative, or the interval or rescale leave [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self):
        low, high = self.interval
        if self.scale < 0:
            raise ValueError(f"`guidance_scale` (={self.scale}) must not be negative.")
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance `interval` (={low}, {high}) must lie in order inside [0, 1]."
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(
                f"guidance `rescale` (={self.rescale}) must lie inside [0, 1]."
            )


def guided(
    model: Model, text: Text, null_text: Text, path: NoisePath, guidance: Guidance
) -> Denoiser:
    """Builds a denoiser with classifier-free guidance.

    One evaluation of twice the rows predicts both velocities.

    Args:
        model: the network.
        text: text states of the prompts.
        null_text: text states of the empty or negative prompts.
        path: the noise path that the network was trained on.
        guidance: scale, interval and rescale.
    """
    if guidance.scale == 1.0:
        return lambda tokens, t: denoise(model, tokens, t, text, path)
    both_texts = _rows(text, null_text)

    def denoiser(tokens: Tokens, t: Float[Array, "b g"]) -> Float[Array, "b n c"]:
        both = denoise(
            model, _rows(tokens, tokens), jnp.concatenate([t, t]), both_texts, path
        )
        with_text, without = jnp.split(both, 2)
        low, high = guidance.interval
        scale = jnp.where((t >= low) & (t <= high), guidance.scale, 1.0)
        velocity = without + tokens.per_token(scale) * (with_text - without)
        if guidance.rescale == 0:
            return velocity
        return _rescaled(velocity, with_text, tokens, t, path, guidance.rescale)

    return denoiser


def _rows(first, second):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


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
