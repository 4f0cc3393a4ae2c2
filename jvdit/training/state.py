"""What training carries from step to step, and the optimizer that moves it."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; or a sharding in the place of each array.

    Attributes:
        step: batches consumed, int32 like the other counts. With the seed it decides
            data and randomness.
        params: float32 master weights.
        ema: their exponential moving average: what samples and evaluations use.
        opt_state: of the optimizer.
        skipped: steps not applied because loss or gradient was not finite.
        skipped_in_a_row: the same, since the last step that was applied.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and decay, clipping, EMA and accumulation.

    Attributes:
        lr: peak learning rate.
        schedule: after warm-up, "constant", "cosine" (to 0 at the last step) or
            "linear" (likewise).
        warmup: steps of linear warm-up.
        b1, b2, eps, weight_decay: of AdamW (arXiv:1711.05101). Only matrices decay.
        clip: largest global norm of a gradient.
        ema: decay of the average; smaller at first, min(ema, (1 + n) / (10 + n)).
        accumulate: parts that a batch is taken in, to save memory; the update is that
            of the whole batch.

    Raises:
        ValueError: a value is out of range.
    """

    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 500
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    accumulate: int = 1

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(
                f"`optim.schedule` (={self.schedule!r}) must be constant, cosine or "
                "linear."
            )
        for name in ("lr", "clip", "accumulate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`optim.{name}` (={getattr(self, name)}) must be > 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"`optim.ema` (={self.ema}) must lie in [0, 1).")

    def learning_rate(self, steps: int) -> optax.Schedule:
        """The learning rate at each step of a run of `steps`."""
        rest = max(steps - self.warmup, 1)
        after = {
            "constant": optax.constant_schedule(self.lr),
            "cosine": optax.cosine_decay_schedule(self.lr, rest),
            "linear": optax.linear_schedule(self.lr, 0.0, rest),
        }[self.schedule]
        if self.warmup == 0:
            return after
        warmup = optax.linear_schedule(self.lr / self.warmup, self.lr, self.warmup)
        return optax.join_schedules([warmup, after], [self.warmup])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipped AdamW for a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.learning_rate(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
            ),
        )


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # Separate buffers: a donated state must not hold one twice.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    ema = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)
    return TrainState(step, params, ema, opt_state, skipped, in_a_row)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a state: parameters, average and moments by the parameter table.

    Args:
        state: a `TrainState`, or its shapes from `jax.eval_shape`.
        mesh: from `make_mesh`.
    """
    params = parameter_shardings(state.params, mesh)
    whole = replicated(mesh)
    structure = jax.tree.structure(state.params)

    def is_params(node):
        return jax.tree.structure(node) == structure

    def place(node):
        return params if is_params(node) else whole

    return TrainState(
        step=whole,
        params=params,
        ema=params,
        opt_state=jax.tree.map(place, state.opt_state, is_leaf=is_params),
        skipped=whole,
        skipped_in_a_row=whole,
    )
