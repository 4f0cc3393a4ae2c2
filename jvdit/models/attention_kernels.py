"""The two passes of flash attention as kernels of a TPU's core.

Scores lie here with a row for each key and a column for each query. Their maxima and
sums are then taken from row to row, which a core does best. And a product over keys or
queries comes out as channels by tokens: one factor stands in the matrix unit, 256 x 256
numbers at a time on v6e, and the rows of the other pass through it. 128 channels are
few rows, but as columns they would leave half of the unit empty.

Exponentials are of base 2, the one that a core has: queries come multiplied by log2(e).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jvdit.models.attention_pieces import HIDDEN

LANES = 128
LN2 = math.log(2)

# Contractions of two blocks by their first or last axes.
_LAST = (((1,), (1,)), ((), ()))
_FIRST = (((0,), (0,)), ((), ()))
_FIRST_LAST = (((0,), (1,)), ((), ()))
_product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _visible(scores: jax.Array, ids: Any, part: Any, left: Any) -> jax.Array:
    """Scores [rows: keys, columns: queries], hidden where the key isn't seen.

    Args:
        scores: of some keys.
        ids: segments of queries and keys, or nothing.
        part: where in the block the keys lie.
        left: how many keys the block has. None: it is full.
    """
    if ids:
        of_queries, of_keys = ids
        columns = of_queries.shape[-1] // LANES
        seen = jnp.tile(of_keys[0, part], (1, columns)) == of_queries[0]
    elif left is not None:
        seen = _places(scores, part) < left
    else:
        return scores
    return jnp.where(seen, scores, HIDDEN)


def _clear(block: Any, left: Any) -> None:
    """Puts zeros in the place of tokens that a block [1 n k] hasn't.

    What a core finds there can be any number.
    """
    if left is not None:

        @pl.when(left < block.shape[1])
        def _():
            tokens = block[0]
            seen = _places(tokens, pl.ds(0, 1)) < left
            block[0] = jnp.where(seen, tokens, jnp.zeros_like(tokens))


def _places(rows: jax.Array, part: Any) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) + part.start


def forward(
    small: Any,
    q: Any,
    k: Any,
    v: Any,
    *refs: Any,
    compute: int,
    keys: int | None,
) -> None:
    """A block of queries sees a block of keys; after the last, what it has seen.

    Queries don't know of one another: of a block beyond the last, nothing is written.

    Args:
        small: by head, whether exponentials of its scores can be summed as they are.
        q: queries [1 n k], scaled.
        k: keys [1 s k].
        v: values [1 s k].
        *refs: segments of queries [1 1 n] and keys [1 s 128], if there are any; result
            [1 n k] and log-sum-exp [1 1 n]; and what is kept between blocks of keys:
            largest scores [1 n], sums of weights [1 n] and of weighted values [k n].
        compute: keys at once.
        keys: how many there are. None: whole blocks.
    """
    *ids, out, lse, top, total, sums = refs
    left = None if keys is None else keys - pl.program_id(2) * k.shape[1]
    is_small = small[pl.program_id(0)] > 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        top[...] = jnp.full(top.shape, jnp.where(is_small, 0, HIDDEN), jnp.float32)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    _clear(v, left)
    see = partial(_see, q, k, v, ids, (top, total, sums), compute, left)
    pl.when(is_small)(partial(see, largest=False))
    pl.when(~is_small)(partial(see, largest=True))

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        some = total[...] > 0
        weight = jnp.where(some, total[...], 1)
        out[0] = (sums[...] / weight).T.astype(out.dtype)
        lse[0] = jnp.where(some, (top[...] + jnp.log2(weight)) * LN2, HIDDEN)


def _see(q, k, v, ids, kept, compute: int, left: Any, *, largest: bool) -> None:
    """Adds keys to what queries have seen (arXiv:2205.14135, Algorithm 1).

    Scores of the next keys, and the sums over the ones before, stand beside
    exponentials, because the compiler keeps about to this order.

    With `largest`, the largest score is subtracted from all.
    """
    top_ref, total_ref, sums_ref = kept
    top, total, sums = (x[...] for x in kept)
    queries = q[0]
    parts = [pl.ds(i, compute) for i in range(0, k.shape[1], compute)]

    def scores(part):
        return _product(k[0, part], queries, _LAST)

    def add(sums, part, weights, shrink):
        new = _product(v[0, part], weights, _FIRST)
        return sums * shrink + new if largest else sums + new

    ahead: Any = scores(parts[0])
    late: Any = None
    for i, part in enumerate(parts):
        here, shrink = _visible(ahead, ids, part, left), None
        if i + 1 < len(parts):
            ahead = scores(parts[i + 1])
        if largest:
            before = top
            top = jnp.maximum(top, here.max(axis=0, keepdims=True))
            shrink = jnp.exp2(before - top)
            total = total * shrink
        if late is not None:
            sums = add(sums, *late)
        weights = jnp.exp2(here - top if largest else here)
        total = total + weights.sum(axis=0, keepdims=True)
        late = part, weights.astype(v.dtype), shrink
    sums_ref[...] = add(sums, *late)
    top_ref[...], total_ref[...] = top, total


def backward(
    q: Any,
    k: Any,
    v: Any,
    grad: Any,
    lse: Any,
    slope: Any,
    *refs: Any,
    compute: int,
    blocks: int,
    sizes: tuple[int | None, int | None],
) -> None:
    """The gradients that a block of queries and one of keys give each other.

    See arXiv:2205.14135, Algorithm 4. The grid has, within a head and a core, blocks of
    queries in one of keys. Gradients of all queries stay where they are added up.

    Args:
        q: queries [1 n k], scaled.
        k: keys [1 s k].
        v: values [1 s k].
        grad: of the result [1 n k].
        lse: log-sum-exp of the scores [1 1 n], of base 2.
        slope: see `attention_pieces.slope_of` [1 1 n].
        *refs: segments as in `forward`; gradients of all queries [1 1 k n], of keys and
            of values [1 s k]; and of the latter two, what is added up, [k s].
        compute: keys at once.
        blocks: of keys, that a core has.
        sizes: how many queries and keys there are. None: whole blocks.
    """
    *ids, dq, dk, dv, dk_sums, dv_sums = refs
    block, index = pl.program_id(2), pl.program_id(3)
    starts = index * q.shape[1], (pl.program_id(1) * blocks + block) * k.shape[1]
    left = [n if n is None else n - x for n, x in zip(sizes, starts, strict=True)]

    @pl.when((block == 0) & (index == 0))
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when(index == 0)
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    for x, n in ((q, left[0]), (grad, left[0]), (k, left[1]), (v, left[1])):
        _clear(x, n)
    queries, grads = q[0], grad[0]
    here = pl.ds(pl.multiple_of(starts[0], LANES), q.shape[1])
    sums = dq[0, 0, :, here]
    for start in range(0, k.shape[1], compute):
        part = pl.ds(start, compute)
        keys, values = k[0, part], v[0, part]
        scores = _product(keys, queries, _LAST) - lse[0]
        weights = jnp.exp2(_visible(scores, ids, part, left[1]))
        dweights = _product(values, grads, _LAST)
        dscores = (weights * (dweights - slope[0])).astype(k.dtype)
        dv_sums[:, part] += _product(grads, weights.astype(grad.dtype), _FIRST_LAST)
        dk_sums[:, part] += _product(queries, dscores, _FIRST_LAST)
        sums += _product(keys, dscores, _FIRST)
    dq[0, 0, :, here] = sums

    @pl.when(index == pl.num_programs(3) - 1)
    def _():
        dk[0] = (dk_sums[...].T * LN2).astype(dk.dtype)
        dv[0] = dv_sums[...].T.astype(dv.dtype)
