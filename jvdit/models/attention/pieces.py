"""Attention to some of the keys, its gradient, and both put together.

Keys that are seen in several pieces, as around a ring of devices, need the logarithm of
the sum of each query's weights beside the result; so does a backward pass that keeps no
scores. Here are the two passes in plain products; those of a kernel fit the same place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jvdit.shapes import Visible

# The score of a hidden key, and the log-sum-exp of a query that sees no key. Finite, so
# that gradients are, and apart, so that the weight of such a query is 0 rather than 1.
HIDDEN, NOTHING = -1e30, -5e29
# Scores up to this part of the largest exponent of a kind of numbers have exponentials,
# and sums of them, that it holds: 53 in float32 and bfloat16, 6.7 in float16.
SMALL_SCORES = 0.6
# The name under which remat finds a result of flash attention and its log-sum-exp.
RESIDUALS = "attention_residuals"

Queries = Float[Array, "b n q k"]
Keys = Float[Array, "b s q k"]
Sums = Float[Array, "b q n"]  # a number for each query


class Pieces(NamedTuple):
    """Attention to some of the keys, and its gradient given what all of them make.

    Attributes:
        forward: (q, k, v, visible) to the result and the log-sum-exp of the scores
            [b q n]; to zeros and `NOTHING` where a query sees no key.
        backward: (q, k, v, visible, lse, slope, gradient of the result), where `lse`
            and `slope_of` the result are of all keys, to the gradients of q, k and v.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(
    q: Queries, k: Keys, v: Keys, visible: Visible | None, pieces: Pieces, keep: bool
) -> Queries:
    """Attention of each query to the keys that it sees, on one device.

    The backward pass computes scores again. With `keep`, result and log-sum-exp are
    named `RESIDUALS`, so that a rematerialised block can keep them in the place of
    computing them anew.
    """
    return pieces.forward(q, k, v, visible)[0].astype(q.dtype)


def _flash_forward(q, k, v, visible, pieces, keep):
    out, lse = pieces.forward(q, k, v, visible)
    out = out.astype(q.dtype)
    if keep:
        out, lse = (checkpoint_name(x, RESIDUALS) for x in (out, lse))
    return out, (q, k, v, visible, out, lse)


def _flash_backward(pieces, keep, saved, grad):
    q, k, v, visible, out, lse = saved
    grads = pieces.backward(q, k, v, visible, lse, slope_of(out, grad), grad)
    grads = (d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))
    return *grads, None


flash.defvjp(_flash_forward, _flash_backward)


def pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    """Makes an axis so long, with a value at its end."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def both(
    out: Queries, lse: Sums, more: Queries, more_lse: Sums
) -> tuple[Queries, Sums]:
    """Attention to the keys of two pieces, in float32, from that to each of them."""
    total = jnp.logaddexp(lse, more_lse)
    first, second = (
        jnp.exp(x - total).swapaxes(1, 2)[..., None] for x in (lse, more_lse)
    )
    return out * first + more * second, total


def edges(visible: Visible | None, block: int, held: int) -> list[Array]:
    """Bounds and ids of whole blocks of queries and keys, as `meets` has it."""
    if visible is None:
        return []

    def of_blocks(x: Array, size: int, reduce: Any) -> Array:
        places = (0, 0), (0, -x.shape[1] % size)
        return reduce(jnp.pad(x, places, "edge").reshape(len(x), -1, size), axis=-1)

    id, low, high = visible
    return [
        of_blocks(low, block, jnp.min),
        of_blocks(low if high is None else high, block, jnp.max),
        of_blocks(id, held, jnp.min),
        of_blocks(id, held, jnp.max),
    ]


def meets(edges: Any, row: Any, i: Any, j: Any) -> Any:
    """Whether a block of queries may see any of a block of keys.

    Args:
        edges: of the blocks of each row: the least `low` and the greatest `high` of
            queries, the least and the greatest id of keys; or nothing.
        row: of the batch.
        i: which block of queries.
        j: which block of keys.
    """
    if not edges:
        return True
    low, high, first, last = edges
    return (low[row, i] <= last[row, j]) & (first[row, j] <= high[row, i])


def slope_of(out: Queries, grad: Queries) -> Sums:
    """What the gradient of each query's weights is taken against: `out` times `grad`.

    It is the D of arXiv:2205.14135, Algorithm 4.
    """
    out, grad = (x.astype(jnp.float32) for x in (out, grad))
    return jnp.einsum("bnqk,bnqk->bqn", out, grad)


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _each_head(function, arrays, visible):
    """Runs a function for one row and head at a time: its scores stay in a cache.

    Arrays, of which the heads are the third axis, and results lie as they are: nothing
    is stacked.
    """
    rows, _, heads, _ = arrays[0].shape

    def part(x, row, head):
        sizes = (1, x.shape[1], 1, x.shape[3])
        x = jax.lax.dynamic_slice(x, (row, 0, head, 0), sizes)
        return x.reshape(x.shape[1::2])

    def compute(row, head):
        own = tuple(part(x, row, head) for x in arrays)
        return function(own, jax.tree.map(lambda x: x[row], visible))

    def run(i, results):
        row, head = i // heads, i % heads
        return tuple(
            jax.lax.dynamic_update_slice(whole, x[None, :, None], (row, 0, head, 0))
            for whole, x in zip(results, compute(row, head), strict=True)
        )

    results = tuple(
        jnp.zeros((rows, x.shape[0], heads, x.shape[1]), x.dtype)
        for x in jax.eval_shape(compute, 0, 0)
    )
    return jax.lax.fori_loop(0, rows * heads, run, results)


def dense_forward(
    q: Queries, k: Keys, v: Keys, visible: Visible | None, *, steady: bool = False
) -> tuple[Queries, Sums]:
    """Attention to some of the keys in plain products; see `Pieces.forward`.

    Scores are at most the product of the lengths of query and key. Where that is small
    the largest needn't be found and subtracted, which takes a pass over all of them.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: which keys each query sees. None: all.
        steady: always subtract the largest, so that the bits of a query don't depend on
            how long queries and keys are that it doesn't see.
    """

    def head(arrays, visible, *, small: bool):
        q, k, v = arrays
        scores = _product("nk,sk->ns", q * q.shape[-1] ** -0.5, k)
        if visible is not None:
            scores = jnp.where(visible.mask(), scores, HIDDEN)
        top = jnp.zeros(len(q)) if small else scores.max(axis=-1, initial=NOTHING)
        weights = jnp.exp(scores if small else scores - top[:, None])
        total = weights.sum(axis=-1)
        # Divided last: there are fewer channels than keys.
        out = _product("ns,sk->nk", weights.astype(v.dtype), v)
        out = out / jnp.where(total > 0, total, 1)[:, None]
        lse = jnp.where(total > 0, top + jnp.log(total), NOTHING)
        return out, lse[None]

    def longest(x: Array) -> Array:
        return jnp.square(x.astype(jnp.float32)).sum(axis=-1).max()

    if steady:
        out, lse = _each_head(partial(head, small=False), (q, k, v), visible)
        return out, lse[:, 0]
    ways = (partial(_each_head, partial(head, small=small)) for small in (True, False))
    most = SMALL_SCORES * np.log(float(jnp.finfo(v.dtype).max))
    small = longest(q) * longest(k) < most**2 * q.shape[-1]
    out, lse = jax.lax.cond(small, *ways, (q, k, v), visible)
    return out, lse[:, 0]


def dense_backward(
    q: Queries,
    k: Keys,
    v: Keys,
    visible: Visible | None,
    lse: Sums,
    slope: Sums,
    grad: Queries,
) -> tuple[Queries, Keys, Keys]:
    """Gradients of q, k, v in plain products (arXiv:2205.14135, Algorithm 4).

    Scores have a row for each key: two of three products then take them as they lie.
    """

    def head(arrays, visible):
        q, k, v, grad, slope, lse = arrays
        scale = q.shape[-1] ** -0.5
        q = q * scale
        scores = _product("sk,nk->sn", k, q)
        if visible is not None:
            scores = jnp.where(visible.mask().T, scores, HIDDEN)
        weights = jnp.exp(scores - lse)
        dscores = weights * (_product("sk,nk->sn", v, grad) - slope)
        dv = _product("sn,nk->sk", weights.astype(grad.dtype), grad)
        dk = _product("sn,nk->sk", dscores.astype(q.dtype), q)
        dq = _product("sn,sk->kn", dscores.astype(k.dtype), k)
        # Turned afterwards: at 1,280 tokens "sn,sk->nk" makes this pass a sixth longer.
        return jax.lax.optimization_barrier(dq).T * scale, dk, dv

    line = (x[:, None] for x in (slope, lse))
    return _each_head(head, (q, k, v, grad, *line), visible)


DENSE = Pieces(dense_forward, dense_backward)
STEADY = Pieces(partial(dense_forward, steady=True), dense_backward)
