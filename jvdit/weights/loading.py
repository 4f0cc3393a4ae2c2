"""Loads released tensors as our parameters, straight onto the devices, and back."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jvdit.models.layers import STACKS
from jvdit.weights.rules import Assignment, Rule, assign, names_of


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict, by path joined with "/"."""
    return flatten_dict(tree, sep="/")


def load(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    shapes: Any,
    shardings: Any | None = None,
    dtype: DTypeLike | None = None,
    what: str = "the checkpoint",
) -> dict[str, Any]:
    """Loads the parameters of a module from another project's tensors.

    Tensors go to the devices one after another, each device getting its own shard; the
    host never holds more than one tensor beside the memory-mapped files.

    Args:
        rules: rule table of the network.
        tensors: tensors of the checkpoint, by name; views of files will do.
        shapes: shapes of the parameters, from `jax.eval_shape` of the module's `init`.
        shardings: sharding of each parameter; None: all on the default device.
        dtype: dtype of the parameters; None: those of `shapes`.
        what: name of the checkpoint in error messages.

    Raises:
        ValueError: the checkpoint is not of this model; lists what differs.
    """
    wanted = paths_of(shapes)
    places = paths_of(shardings) if shardings is not None else {}
    found = assign(
        rules,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {path: tuple(leaf.shape) for path, leaf in wanted.items()},
        what,
    )
    leaves = {}
    for path, leaf in wanted.items():
        kind = jnp.dtype(dtype or leaf.dtype)
        place = places.get(path)
        leaves[path] = _leaf(found, path, tensors, kind, place)
    return unflatten_dict(leaves, sep="/")


def _leaf(
    found: Assignment,
    path: str,
    tensors: Mapping[str, np.ndarray],
    dtype: np.dtype,
    place: NamedSharding | None,
) -> jax.Array:
    pieces = found.pieces[path]
    if pieces[0].layer is None:
        return _placed(pieces[0].rule.to_ours(tensors[pieces[0].name]), dtype, place)
    # Layer after layer is written into a stack that is already sharded.
    shape = found.shapes[path]
    zeros, write = _stacking(shape, dtype, place)
    stack = zeros()
    inner = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    for piece in pieces:
        layer = _placed(piece.rule.to_ours(tensors[piece.name]), dtype, inner)
        stack = write(stack, layer, piece.layer)
    return stack


@lru_cache
def _stacking(shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None):
    """Compiled functions that allocate a stack, and that write a layer into it."""
    zeros = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=place)
    return zeros, jax.jit(_write, donate_argnums=0, out_shardings=place)


def _write(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _placed(
    value: np.ndarray, dtype: np.dtype, place: NamedSharding | None
) -> jax.Array:
    if place is None:
        return jnp.asarray(np.ascontiguousarray(value).astype(dtype, copy=False))
    return jax.make_array_from_callback(
        value.shape,
        place,
        lambda index: np.ascontiguousarray(value[index]).astype(dtype, copy=False),
    )


def export(rules: Sequence[Rule], params: Any) -> dict[str, np.ndarray]:
    """Converts our parameters to released tensors: the inverse of `load`, bit for bit.

    Args:
        rules: rule table of the network.
        params: parameters of the network.

    Raises:
        ValueError: no rule names the tensor of a parameter.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes: dict[str, int] = {}
    for path, leaf in paths_of(params).items():
        value = np.asarray(leaf)
        stacked = path.partition("/")[0] in STACKS
        layers = value.shape[0] if stacked else 0
        for piece in names_of(rules, path, layers):
            own = value if piece.layer is None else value[piece.layer]
            turned = np.ascontiguousarray(piece.rule.to_theirs(own))
            parts.setdefault(piece.name, {})[piece.rule.part[0]] = turned
            axes[piece.name] = piece.rule.axis
    return {
        name: found[0]
        if len(found) == 1
        else np.concatenate([found[i] for i in sorted(found)], axes[name])
        for name, found in parts.items()
    }
