"""A critic as a part of an autoencoder's training (VQGAN, arXiv:2012.09841).

Both networks are trained in one step, on one loss: the autoencoder to be judged real by
a critic that is held fixed, and the critic to tell real clips from reconstructions that
are held fixed. So the gradient of each is its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jvdit.models.critics import PictureCritic, SoundCritic
from jvdit.ranges import check_ranges
from jvdit.training.step import Metrics

_LAST = "conv_out"  # the last layer of the decoder of every autoencoder
_MOST = 1e4  # the largest ratio of the two gradients, as in VQGAN's own code
_LEAST = 1e-3  # features of this size and below don't matter

Errors = Callable[[Array], tuple[Float[Array, ""], Metrics]]


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic, and how much an autoencoder heeds it.

    What the autoencoder minimises beside its errors is the generator's hinge loss
    (arXiv:1705.02894) and the distance of the critic's features, each relative to its
    size on real clips (arXiv:2210.13438, Eq. 2). Their sum is scaled so that its
    gradient at the decoder's last layer is `weight` times that of the errors
    (arXiv:2012.09841, Eq. 7). With gradient accumulation each part of a batch has a
    scale of its own.

    Attributes:
        module: the network.
        weight: of its judgement, relative to the errors.
        matching: of the features' distance, relative to the hinge loss.
        heeded: whether it is trained and heeded. If not, it costs nothing and changes
            nothing: its parameters wait for the step at which it is to start. (A step
            that decides while it runs isn't as good: within `lax.cond`, XLA on CPU
            takes a convolution's gradient 30 to 80 times slower, jax 0.10.)

    Raises:
        ValueError: a number is out of range.
    """

    module: PictureCritic | SoundCritic
    weight: float = 0.5
    matching: float = 1.0
    heeded: bool = True

    def __post_init__(self):
        check_ranges({"weight": self.weight, "matching": self.matching}, "critic.")

    def init(self, key: PRNGKeyArray, clips: Array) -> Any:
        """Initialises the parameters; of the clips only shapes matter."""
        return self.module.init(jax.random.fold_in(key, 1), clips)["params"]

    def loss(
        self,
        params: Any,
        decode: Callable[[Any], Array],
        errors: Errors,
        real: Array,
        valid: Float[Array, " b"],
    ) -> tuple[Float[Array, ""], Metrics]:
        """As `reconstruction_loss`, from the errors, the judgement and the hinge."""
        stop, vae, critic = jax.lax.stop_gradient, params["vae"], params["critic"]

        def of_last(last: Any) -> Array:
            return decode({**vae, "decoder": {**vae["decoder"], _LAST: last}})

        decoded, to_last = jax.vjp(of_last, vae["decoder"][_LAST])
        graded = jax.value_and_grad(errors, has_aux=True)
        (error, metrics), slope = graded(stop(decoded))
        judge = jax.grad(self._judge, argnums=(0, 1), has_aux=True)
        slopes, terms = judge(stop(critic), stop(decoded), real, valid)
        balance = stop(self.weight * balanced(to_last(slope), to_last(slopes[1])))
        generator = terms["adversarial"] + self.matching * terms["matching"]
        value = error + balance * generator + terms["critic"]
        # Both gradients are known by now: no second pass back through the critic.
        at = slopes[0], slope + balance * slopes[1]
        loss = _with_slope(value, (critic, decoded), at)
        terms["balance"] = balance * valid.sum()
        return loss, {**metrics, **terms}

    def _judge(
        self, params: Any, decoded: Array, real: Array, valid: Array
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """What each network minimises, as a function of its own numbers alone."""
        stop = jax.lax.stop_gradient

        def look(params: Any, clips: Array) -> Any:
            return self.module.apply({"params": params}, clips)

        ours, features = look(stop(params), decoded)
        theirs, goals = look(params, real)
        told, _ = look(params, stop(decoded))
        by_clip = {
            "adversarial": -sum(map(_by_clip, ours)) / len(ours),
            "matching": matching(features, [stop(x) for x in goals], valid),
            "critic": hinge(theirs, told),
        }
        terms = {name: (valid * x).sum() for name, x in by_clip.items()}
        generator = terms["adversarial"] + self.matching * terms["matching"]
        return generator + terms["critic"], terms


def reconstruction_loss(
    critic: Critic | None,
    params: Any,
    decode: Callable[[Any], Array],
    errors: Errors,
    real: Array,
    valid: Float[Array, " b"],
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a reconstruction, by its errors and, if there is one, by a critic.

    Args:
        critic: the critic; None: the errors are everything.
        params: parameters by network: "vae", and "critic" if there is one.
        decode: decodes the batch with given parameters of the autoencoder.
        errors: the sum over clips of the errors of a reconstruction, and metrics.
        real: the clips themselves.
        valid: 1 for clips that count, 0 for others.

    Returns:
        The sum over clips, and metrics. The critic's are "critic" (its hinge loss: 1
        where it tells nothing, 0 where it tells all), "adversarial", "matching" and
        "balance" (what those two are multiplied by).
    """
    if critic is None or not critic.heeded:
        return errors(decode(params["vae"]))
    return critic.loss(params, decode, errors, real, valid)


def hinge(real: list[Array], decoded: list[Array]) -> Float[Array, " b"]:
    """The critic's hinge loss of each clip, from the logits of each resolution.

    A logit that is right by 1 or more has no gradient (arXiv:1705.02894, section 4.3).
    """
    losses = [
        0.5 * (_by_clip(jax.nn.relu(1 - a)) + _by_clip(jax.nn.relu(1 + b)))
        for a, b in zip(real, decoded, strict=True)
    ]
    return sum(losses[1:], losses[0]) / len(losses)


def matching(
    ours: list[Array], theirs: list[Array], valid: Float[Array, " b"]
) -> Float[Array, " b"]:
    """Distance of features of each clip, relative to their size over the real ones."""
    total = jnp.zeros_like(valid)
    for a, b in zip(ours, theirs, strict=True):
        size = (valid * _by_clip(jnp.abs(b))).sum() / jnp.maximum(valid.sum(), 1)
        total += _by_clip(jnp.abs(a - b)) / (size + _LEAST)
    return total / len(ours)


def balanced(errors: Any, generator: Any) -> Float[Array, ""]:
    """The factor by which the generator's gradient becomes as large as the errors'.

    It is lambda of arXiv:2012.09841, Eq. 7.

    Args:
        errors: gradient of the errors at the decoder's last layer.
        generator: gradient of the generator's loss there.
    """
    ratio = optax.global_norm(errors) / (optax.global_norm(generator) + 1e-6)
    return jnp.clip(ratio, 0, _MOST)


def _with_slope(value: Array, at: Any, slope: Any) -> Array:
    """A value whose gradient is known: `slope` with respect to `at`."""
    moved = jax.tree.map(
        lambda x, s: jnp.sum(s * (x - jax.lax.stop_gradient(x))), at, slope
    )
    return jax.lax.stop_gradient(value) + sum(jax.tree.leaves(moved))


def _by_clip(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return x.reshape(len(x), -1).mean(1)
