"""Attention whose rows, heads and tokens are divided over the devices of a mesh.

Rows and heads don't know of one another. Tokens do, and two ways lead from a part of
them on each device to all pairs: groups of neighbours trade tokens for heads, so that
each sees all tokens of the group with some of the heads (Ulysses, arXiv:2309.14509);
and keys and values travel around a ring of such groups, while each device adds up what
it has seen (arXiv:2310.01889). Ulysses sends less, but needs a head for each device.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from jvdit.models.attention.pieces import (
    RESIDUALS,
    Keys,
    Pieces,
    Queries,
    both,
    slope_of,
)
from jvdit.shapes import Visible
from jvdit.sharding import activation_spec, fit

AXIS = "context"
# Devices that trade tokens for heads: neighbours, between which links are short.
MOST_ULYSSES = 8
Local = Callable[[Array, Array, Array, Visible | None], Array]


def divide_context(size: int, heads: int) -> tuple[int, int]:
    """Splits the devices along "context" into (Ulysses, ring).

    Args:
        size: devices along the axis.
        heads: that each of them would hold without Ulysses.
    """
    ulysses = next(
        u for u in range(min(size, MOST_ULYSSES), 0, -1) if not (size % u or heads % u)
    )
    return ulysses, size // ulysses


def divided(
    local: Local,
    pieces: Pieces,
    q: Queries,
    k: Keys,
    v: Keys,
    visible: Visible | None,
    keys: str,
) -> Queries:
    """Attention on the current mesh.

    An axis that the mesh doesn't divide stays whole, and is computed on each device.

    Args:
        local: attention on one device: (q, k, v, visible).
        pieces: the same in pieces, for the ring.
        q: queries.
        k: keys.
        v: values.
        visible: which keys each query sees; None: all.
        keys: the name of the keys' axis in `sharding.ACTIVATIONS`: "tokens", of which
            each device has a part, or "text", which every device has whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_query, of_key = _spec(q, "tokens", mesh), _spec(k, keys, mesh)
    size = mesh.shape[AXIS] if of_query[1] and of_key[1] else 1
    if size == 1:
        of_key = PartitionSpec(of_key[0], None, *of_key[2:])
    heads = q.shape[2] // _ways(of_query[2], mesh)
    ulysses, ring = divide_context(size, heads)

    def on_device(q: Array, k: Array, v: Array, visible: Visible | None) -> Array:
        groups = np.arange(size).reshape(ring, ulysses).tolist()
        if ulysses > 1:
            q, k, v = (_trade(x, groups, 2, 1) for x in (q, k, v))
            gather = partial(jax.lax.all_gather, axis_index_groups=groups, axis=1)
            visible = jax.tree.map(lambda x: gather(x, AXIS, tiled=True), visible)
        if ring > 1:
            out: Any = _ring(q, k, v, visible, pieces, (ulysses, ring))
        else:
            out = local(q, k, v, visible)
        return _trade(out, groups, 1, 2) if ulysses > 1 else out

    rows, columns = (PartitionSpec(*place[:2]) for place in (of_query, of_key))
    seen = visible and jax.tree.map(lambda _: rows, visible)._replace(id=columns)
    return jax.shard_map(
        on_device,
        in_specs=(of_query, of_key, of_key, seen),
        out_specs=of_query,
        check_vma=False,
    )(q, k, v, visible)


def _spec(x: Array, tokens: str, mesh: AbstractMesh) -> PartitionSpec:
    return fit(activation_spec("batch", tokens, "heads", None), x.shape, mesh.shape)


def _ways(names: str | tuple[str, ...] | None, mesh: AbstractMesh) -> int:
    names = (names,) if isinstance(names, str) else (names or ())
    return math.prod(mesh.shape[name] for name in names)


def _trade(x: Array, groups: list[list[int]], split: int, concat: int) -> Array:
    return jax.lax.all_to_all(
        x, AXIS, split, concat, axis_index_groups=groups, tiled=True
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ring(q, k, v, visible, pieces: Pieces, sizes: tuple[int, int]) -> Array:
    return _ring_forward(q, k, v, visible, pieces, sizes)[0]


def _ring_forward(q, k, v, visible, pieces, sizes):
    turns = _turns(q, k, v, visible, sizes)
    out, lse = pieces.forward(*next(turns))
    out = out.astype(jnp.float32)
    for here in turns:
        out, lse = both(out, lse, *pieces.forward(*here))
    out, lse = (checkpoint_name(x, RESIDUALS) for x in (out.astype(q.dtype), lse))
    return out, (q, k, v, visible, out, lse)


def _ring_backward(pieces, sizes, saved, grad):
    q, k, v, visible, out, lse = saved
    slope = slope_of(out, grad)
    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for here in _turns(q, k, v, visible, sizes):
        parts = pieces.backward(*here, lse, slope, grad)
        dq, dk, dv = (a + b.astype(a.dtype) for a, b in zip(sums, parts, strict=True))
        # Gradients of keys travel with them, and are home after the last turn.
        sums = dq, *_pass_on((dk, dv), sizes)
    grads = (d.astype(x.dtype) for d, x in zip(sums, (q, k, v), strict=True))
    return *grads, None


_ring.defvjp(_ring_forward, _ring_backward)


def _turns(q, k, v, visible, sizes: tuple[int, int]) -> Iterator[Any]:
    """(q, k, v, visible) turn after turn, with the keys that a device has then.

    Not a loop of the program: transfers then hide behind the turns before.
    """
    held = k, v, visible and visible.id
    for left in range(sizes[1] - 1, -1, -1):
        k, v, id = held
        held = _pass_on(held, sizes) if left else held
        yield q, k, v, visible and visible.among(id)


def _pass_on(values, sizes: tuple[int, int]):
    """Hands values to the device at the same place of the next group."""
    ulysses, ring = sizes
    size = ulysses * ring
    steps = [(i, (i + ulysses) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, steps), values)
