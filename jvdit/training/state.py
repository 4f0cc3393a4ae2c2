"""The training state: everything that one step passes to the next."""

from itertools import takewhile
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """The training state, as a checkpoint holds it.

    Also used with a shape or a sharding in the place of each array.

    Attributes:
        step: batches consumed, int32 like the other counts. Together with the seed it
            determines the data order and all randomness.
        params: float32 master weights, by network.
        ema: exponential moving average of the weights, which sampling and evaluation
            use.
        opt_state: state of the optimizer.
        skipped: steps not applied because loss, gradient or update wasn't finite.
        skipped_in_a_row: such steps since the last one that was applied.
    """

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    skipped: Any
    skipped_in_a_row: Any


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Initialises the state before the first step; the average starts at `params`."""
    # Separate buffers: a donated state must not hold one twice.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    ema = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)
    return TrainState(step, params, ema, opt_state, skipped, in_a_row)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a state: each average and moment is sharded like its parameter.

    Args:
        state: a `TrainState`, or its shapes from `jax.eval_shape`.
        mesh: the device mesh, from `make_mesh`.
    """
    whole, params = replicated(mesh), parameter_shardings(state.params, mesh)
    by_name = {_names(path): p for path, p in jax.tree.leaves_with_path(params)}

    def place(path, leaf):
        # The path of an average or a moment ends with that of its parameter.
        return by_name.get(_names(path), whole) if leaf.ndim else whole

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path: Any) -> tuple[str, ...]:
    """The dictionary keys at the end of a path: which parameter it leads to."""
    keys = takewhile(lambda x: isinstance(x, jax.tree_util.DictKey), reversed(path))
    return tuple(str(key.key) for key in keys)
