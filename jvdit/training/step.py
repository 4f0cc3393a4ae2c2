"""The training step: one update of the weights, for any objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jvdit.machine.compilation import compiler_options
from jvdit.sharding import batch_sharding
from jvdit.training.optim import Optim
from jvdit.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Any]  # name: a sum, or a pair (sum, weight)

_NOTHING: Mapping[str, Any] = {}


@runtime_checkable
class Objective(Protocol):
    """A training objective: initial parameters, and a loss over batches."""

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Initialises the parameters, by network; of `batch` only shapes matter."""
        ...

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Adds what is drawn at random for a batch: timesteps, a key for each row."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How many tokens, or clips, a prepared batch's loss is averaged over."""
        ...

    def loss(
        self, params: Any, batch: Batch, *, ema: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The *sum* of the loss over a prepared batch, and sums of metrics.

        Args:
            params: parameters by network, frozen ones included.
            batch: a batch from `prepare`.
            ema: moving average of the parameters, frozen ones included; for a teacher.
            step: number of the training step, for terms that change over a run.

        Returns:
            The sum, to be divided by `weight`; and for each metric a sum, also divided
            by `weight`, or a pair (sum, weight) if it has a weight of its own.
        """
        ...


def make_train_step(
    objective: Objective, optim: Optim, steps: int, seed: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the training step, to be jitted over a mesh.

    Loss and gradient are summed over the parts of the batch (`optim.accumulate`) and
    divided once by the weight of the whole batch, so the update is the same in any
    number of parts. A step whose loss or gradient isn't finite changes nothing but the
    counts. Non-finite numbers in an update are left out one by one; the step counts as
    skipped if a bias, or another vector, has some.

    Args:
        objective: what to train.
        optim: optimizer settings.
        steps: how many steps the whole run has, for the learning-rate schedule.
        seed: seed of all randomness.

    Returns:
        A function `(state, batch, frozen) -> (state, metrics)`, where `frozen` holds
        parameters by network that the loss needs and that aren't trained.
    """
    optimizer = optim.optimizer(steps)
    learning_rate = optim.learning_rate(steps)

    def train_step(
        state: TrainState, batch: Batch, frozen: Mapping[str, Any] = _NOTHING
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = objective.prepare(batch, key)
        weight = jnp.maximum(objective.weight(batch), 1)
        ema = jax.lax.stop_gradient({**frozen, **state.ema})

        def loss_of(params: Any, part: Batch) -> tuple[Array, Metrics]:
            params = {**frozen, **params}
            return objective.loss(params, part, ema=ema, step=state.step)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), grads = _accumulated(
            lambda part: gradient(state.params, part), batch, optim.accumulate
        )
        loss, grads = loss / weight, jax.tree.map(lambda g: g / weight, grads)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = _updated(state, grads, finite, optimizer, optim.ema)
        metrics = {name: _mean(value, weight) for name, value in metrics.items()}
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    return train_step


def _updated(
    state: TrainState,
    grads: Any,
    finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    ema: float,
) -> TrainState:
    """The state after a step: what isn't finite in the update stays as it was."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    applied = state.step - state.skipped
    decay = jnp.minimum(ema, (1.0 + applied) / (10.0 + applied))
    average = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    old = state.params, state.ema, state.opt_state
    sound = finite & _finite((params, opt_state))
    params, average, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite & jnp.isfinite(new), new, old),
        (params, average, opt_state),
        old,
    )
    bad = 1 - sound.astype(jnp.int32)
    skipped, in_a_row = state.skipped + bad, bad * (state.skipped_in_a_row + 1)
    return TrainState(state.step + 1, params, average, opt_state, skipped, in_a_row)


def jit_train_step(
    objective: Objective,
    optim: Optim,
    steps: int,
    seed: int,
    *,
    mesh: Mesh,
    shardings: TrainState,
    frozen: Any,
    options: Sequence[str] = (),
) -> Any:
    """Jits the training step over a mesh; training and pod forecasts both compile it.

    Args:
        objective: what to train.
        optim: optimizer settings.
        steps: how many steps the whole run has.
        seed: seed of all randomness.
        mesh: the device mesh, over which the rows of a batch are divided.
        shardings: shardings of the state, which is donated.
        frozen: shardings of the frozen parameters.
        options: XLA compiler options, each "NAME=VALUE".
    """
    return jax.jit(
        make_train_step(objective, optim, steps, seed),
        in_shardings=(shardings, batch_sharding(mesh), frozen),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(options),
    )


def _finite(tree: Any) -> Array:
    """Whether all vectors are finite.

    Matrices aren't checked, because a TPU would keep several in memory for it.
    """
    small = [x for x in jax.tree.leaves(tree) if x.ndim < 2]
    return jnp.stack([jnp.isfinite(x).all() for x in small]).all()


def _mean(value, weight):
    if isinstance(value, tuple):
        total, weight = value
        return jnp.where(weight > 0, total / jnp.maximum(weight, 1e-9), jnp.nan)
    return value / weight


def _accumulated(compute: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """Sums `compute` over equal parts of the batch's rows."""
    if parts == 1:
        return compute(batch)
    rows = len(next(iter(batch.values())))
    if rows % parts:
        raise ValueError(
            f"rows of a batch (={rows}) must be divisible by `optim.accumulate` "
            f"(={parts}); try {-(-rows // parts) * parts} rows."
        )

    # Rows i, i + parts, ...: each part keeps rows of every device.
    def split(x):
        return jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0)

    split_batch = jax.tree.map(split, dict(batch))
    first = jax.tree.map(lambda x: x[0], split_batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, first))

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(part)), None

    return jax.lax.scan(add, zeros, split_batch)[0]
