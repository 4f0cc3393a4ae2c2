"""One update of the weights: the same for every objective."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jvdit.machine.compilation import compiler_options
from jvdit.sharding import batch_sharding
from jvdit.training.optim import Optim
from jvdit.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Any]  # an array each, or a pair of them

_NOTHING: Mapping[str, Any] = {}


@runtime_checkable
class Objective(Protocol):
    """What is trained: parameters, and a loss over batches of them."""

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Fresh parameters."""
        ...

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Adds what is drawn for the whole batch: times, a key for each row."""
        ...

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """How much there is to average over in a prepared batch: tokens, pixels."""
        ...

    def loss(
        self, params: Any, batch: Batch, *, ema: Any, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The *sum* of the loss over a prepared batch, and sums of metrics.

        Args:
            params: by network, those that are frozen included.
            batch: prepared.
            ema: the average of the parameters, frozen ones beside it: a teacher.
            step: the number of the step, for what begins later or fades.

        A metric is `name: sum / weight` or, where it has a weight of its own, a pair
        (sum, weight).
        """
        ...


def make_train_step(
    objective: Objective, optim: Optim, steps: int, seed: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function `(state, batch, frozen) -> (state, metrics)` to jit with the mesh.

    `frozen` are parameters by network, as those of the state, that stay as they are;
    the loss is given both, as it is given the average.

    Sums of loss and gradient are taken over the parts of the batch
    (`optim.accumulate`) and divided once by the weight of the whole, so the update is
    the same in any number of parts. A step whose loss or gradient isn't finite changes
    nothing but its count. Of an update, numbers that aren't finite are left out, and it
    counts as skipped if a bias, or another vector, has some.
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
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        applied = state.step - state.skipped
        decay = jnp.minimum(optim.ema, (1.0 + applied) / (10.0 + applied))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = state.params, state.ema, state.opt_state
        sound = finite & _finite((params, opt_state))
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite & jnp.isfinite(new), new, old),
            (params, ema, opt_state),
            old,
        )
        bad = 1 - sound.astype(jnp.int32)
        metrics = {name: _mean(value, weight) for name, value in metrics.items()}
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "skipped": state.skipped + bad,
            "skipped_in_a_row": bad * (state.skipped_in_a_row + 1),
        }
        return TrainState(
            step=state.step + 1,
            params=params,
            ema=ema,
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=bad * (state.skipped_in_a_row + 1),
        ), metrics

    return train_step


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
    """`make_train_step`, mapped over the mesh: what training and its forecasts compile.

    Args:
        objective: what is trained.
        optim: how.
        steps: of the whole run.
        seed: of its randomness.
        mesh: rows of a batch are divided over it.
        shardings: of the state, whose memory is used again.
        frozen: shardings of the frozen parameters.
        options: of XLA, see `compilation`.
    """
    return jax.jit(
        make_train_step(objective, optim, steps, seed),
        in_shardings=(shardings, batch_sharding(mesh), frozen),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(options),
    )


def _finite(tree: Any) -> Array:
    """Whether all vectors are finite; of matrices, a TPU would keep several for it."""
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
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(compute, jax.tree.map(lambda x: x[0], split_batch)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(part)), None

    return jax.lax.scan(add, zeros, split_batch)[0]
