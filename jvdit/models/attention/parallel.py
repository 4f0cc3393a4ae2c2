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
from jaxtyping import Array, Float

from jvdit.models.attention.pieces import (
    RESIDUALS,
    Pieces,
    Segments,
    no_gradient,
    slope_of,
)
from jvdit.sharding import activation_spec, fit

AXIS = "context"
# Devices that trade tokens for heads: neighbours, between which links are short.
MOST_ULYSSES = 8
Local = Callable[[Array, Array, Array, Segments], Array]


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
    q: Float[Array, "b n q k"],
    k: Float[Array, "b s q k"],
    v: Float[Array, "b s q k"],
    segments: Segments,
) -> Float[Array, "b n q k"]:
    """Attention on the current mesh.

    Keys are taken to be divided over "context" if they are as many as the queries:
    those of text are few, and every device has them all. An axis that the mesh doesn't
    divide stays whole, and is computed on each device.

    Args:
        local: attention on one device: (q, k, v, segments).
        pieces: the same in pieces, for the ring.
        q: queries.
        k: keys.
        v: values.
        segments: () or the clips of queries [b n] and of keys [b s].
    """
    mesh = jax.sharding.get_abstract_mesh()
    among = k.shape[1] == q.shape[1]
    places = _spec(q, "tokens", mesh), _spec(k, "tokens" if among else "text", mesh)
    size = mesh.shape[AXIS] if among and places[0][1] else 1
    heads = q.shape[2] // _ways(places[0][2], mesh)
    ulysses, ring = divide_context(size, heads)

    def on_device(q: Array, k: Array, v: Array, *segments: Array) -> Array:
        groups = np.arange(size).reshape(ring, ulysses).tolist()
        if ulysses > 1:
            q, k, v = (_trade(x, groups, 2, 1) for x in (q, k, v))
            segments = tuple(
                jax.lax.all_gather(
                    x, AXIS, axis_index_groups=groups, axis=1, tiled=True
                )
                for x in segments
            )
        out: Any
        if ring > 1:
            out = _ring(q, k, v, segments, pieces, (ulysses, ring))
        else:
            out = local(q, k, v, segments)  # type: ignore[arg-type]
        return _trade(out, groups, 1, 2) if ulysses > 1 else out

    segment_places = tuple(PartitionSpec(*place[:2]) for place in places)
    return jax.shard_map(
        on_device,
        in_specs=(places[0], places[1], places[1], *segment_places[: len(segments)]),
        out_specs=places[0],
        check_vma=False,
    )(q, k, v, *segments)


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
def _ring(
    q: Array,
    k: Array,
    v: Array,
    segments: Segments,
    pieces: Pieces,
    sizes: tuple[int, int],
) -> Array:
    return _ring_forward(q, k, v, segments, pieces, sizes)[0]


def _ring_forward(q, k, v, segments, pieces, sizes):
    out: Any = None
    lse: Any = None
    for k_here, v_here, keys in _turns((k, v, segments[1:]), sizes):
        part, part_lse = pieces.forward(q, k_here, v_here, (*segments[:1], *keys))
        if lse is None:
            out, lse = part.astype(jnp.float32), part_lse
            continue
        total = jnp.logaddexp(lse, part_lse)
        out = out * _by_query(lse - total) + part * _by_query(part_lse - total)
        lse = total
    out, lse = (checkpoint_name(x, RESIDUALS) for x in (out.astype(q.dtype), lse))
    return out, (q, k, v, segments, out, lse)


def _ring_backward(pieces, sizes, saved, grad):
    q, k, v, segments, out, lse = saved
    slope = slope_of(out, grad)
    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for k_here, v_here, keys in _turns((k, v, segments[1:]), sizes):
        seen = (*segments[:1], *keys)
        parts = pieces.backward(q, k_here, v_here, seen, lse, slope, grad)
        dq, dk, dv = (a + b.astype(a.dtype) for a, b in zip(sums, parts, strict=True))
        # Gradients of keys travel with them, and are home after the last turn.
        sums = dq, *_pass_on((dk, dv), sizes)
    grads = (d.astype(x.dtype) for d, x in zip(sums, (q, k, v), strict=True))
    return *grads, no_gradient(segments)


_ring.defvjp(_ring_forward, _ring_backward)


def _turns(held: Any, sizes: tuple[int, int]) -> Iterator[Any]:
    """What a device has of keys and values, turn after turn.

    Not a loop of the program: transfers then hide behind the turns before.
    """
    for left in range(sizes[1] - 1, -1, -1):
        here, held = held, _pass_on(held, sizes) if left else None
        yield here


def _pass_on(values, sizes: tuple[int, int]):
    """Hands values to the device at the same place of the next group."""
    ulysses, ring = sizes
    size = ulysses * ring
    steps = [(i, (i + ulysses) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, steps), values)


def _by_query(log_weight: Float[Array, "b q n"]) -> Float[Array, "b n q 1"]:
    return jnp.exp(log_weight).swapaxes(1, 2)[..., None]
