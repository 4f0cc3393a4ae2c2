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

from jvdit.models.attention.pieces import HIDDEN, NOTHING, meets

LANES = 128
LN2 = math.log(2)
# Part of the largest exponent of a type that sums of exponentials may have; the rest is
# for values.
ROOM = 0.75

# Contractions of two blocks by their first or last axes.
_LAST = (((1,), (1,)), ((), ()))
_FIRST = (((0,), (0,)), ((), ()))
_FIRST_LAST = (((0,), (1,)), ((), ()))
_product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _hide(scores: jax.Array, ids: Any, part: Any, left: Any) -> jax.Array:
    """Scores [rows: keys, columns: queries], hidden where the key isn't seen.

    Args:
        scores: of some keys.
        ids: of keys; `low` and, unless it is the same, `high` of queries; or nothing.
        part: where in the block the keys lie.
        left: how many keys the block has. None: it is full.
    """
    if ids:
        of_keys, low, *high = ids
        id = jnp.tile(of_keys[0, part], (1, low.shape[-1] // LANES))
        seen = (low[0] <= id) & (id <= high[0][0]) if high else id == low[0]
    elif left is not None:
        seen = _places(scores, part) < left
    else:
        return scores
    return jnp.where(seen, scores, HIDDEN)


def _left(sizes: tuple[int | None, int | None], starts: Any) -> list[Any]:
    """Queries and keys that there are from some places on. None: whole blocks."""
    return [n if n is None else n - x for n, x in zip(sizes, starts, strict=True)]


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


def forward(edges, q, k, v, *refs, compute, sizes, heads) -> None:
    """A block of queries sees a block of keys; after the last, what it has seen.

    Args:
        edges: of the blocks, see `meets`; nothing where every query sees every key.
        q: queries [1 n k], scaled.
        k: keys [1 s k].
        v: values [1 s k].
        *refs: ids of keys [1 s 128] and bounds of queries [1 1 n], if there are edges;
            result [1 n k] and log-sum-exp [1 1 n]; and what is kept between blocks of
            keys: what was subtracted from scores [1 n], sums of weights [1 n] and of
            weighted values [k n].
        compute: keys at once.
        sizes: how many queries and keys there are. None: whole blocks.
        heads: of a row.
    """
    *ids, out, lse, top, total, sums = refs
    i, j = pl.program_id(1), pl.program_id(2)
    left = _left(sizes, (i * q.shape[1], j * k.shape[1]))

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, NOTHING)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def scores(part: Any) -> jax.Array:
        return _hide(_product(k[0, part], q[0], _LAST), ids, part, left[1])

    def weighted(part: Any, weights: jax.Array) -> jax.Array:
        return _product(v[0, part], weights.astype(v.dtype), _FIRST)

    @pl.when(meets(edges, pl.program_id(0) // heads, i, j))
    def _():
        _clear(q, left[0])
        _clear(v, left[1])
        parts = [pl.ds(i, compute) for i in range(0, k.shape[1], compute)]
        most = 2.0 ** (ROOM * jnp.finfo(v.dtype).maxexp)
        _see(parts, scores, weighted, most, top, total, sums)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        some = jnp.where(total[...] > 0, total[...], 1) if edges else total[...]
        out[0] = (sums[...] / some).T.astype(out.dtype)
        lse[0] = (top[...] + jnp.log2(some)) * LN2


def _see(parts, scores, weighted, most, top, total, sums) -> None:
    """Adds keys to what queries have seen (arXiv:2205.14135, Algorithm 1).

    What is subtracted from scores is of the order of the largest in earlier blocks:
    exponentials then needn't wait until this block's is found. If their sum grows
    beyond `most`, the block is done again.
    """
    before, new_total, new_sums = top[...], total[...], sums[...]
    # The next scores and the last sums stand beside exponentials: the compiler keeps
    # about to this order, and a core does all three at once.
    ahead: Any = scores(parts[0])
    late: Any = None
    for i, part in enumerate(parts):
        here = ahead
        if i + 1 < len(parts):
            ahead = scores(parts[i + 1])
        if late is not None:
            new_sums += weighted(*late)
        weights = jnp.exp2(here - before)
        new_total += weights.sum(axis=0, keepdims=True)
        late = part, weights
    new_sums += weighted(*late)
    held = jnp.max(new_total) < most

    @pl.when(held)
    def _():
        grown = jnp.maximum(jnp.log2(new_total), 0)
        shrink = jnp.exp2(-grown)
        top[...], total[...] = before + grown, new_total * shrink
        sums[...] = new_sums * shrink

    @pl.when(~held)
    def _():
        for part in parts:
            here, before = scores(part), top[...]
            top[...] = jnp.maximum(before, here.max(axis=0, keepdims=True))
            shrink, weights = jnp.exp2(before - top[...]), jnp.exp2(here - top[...])
            total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
            sums[...] = sums[...] * shrink + weighted(part, weights)


def backward(edges, q, k, v, grad, lse, slope, *refs, compute, sizes, heads) -> None:
    """The gradients that a block of queries and one of keys give each other.

    See arXiv:2205.14135, Algorithm 4. The grid has, within a head and a core, blocks of
    queries in one of keys. Gradients of all queries stay where they are added up.

    Args:
        edges: of the blocks, see `meets`; nothing where every query sees every key.
        q: queries [1 n k], scaled.
        k: keys [1 s k].
        v: values [1 s k].
        grad: of the result [1 n k].
        lse: log-sum-exp of the scores [1 1 n], of base 2.
        slope: see `pieces.slope_of` [1 1 n].
        *refs: ids and bounds as in `forward`; gradients of all queries [1 1 k n], of
            keys and of values [1 s k]; and of the latter two, what is added up, [k s].
        compute: keys at once.
        sizes: how many queries and keys there are. None: whole blocks.
        heads: of a row.
    """
    *ids, dq, dk, dv, dk_sums, dv_sums = refs
    index = pl.program_id(3)
    block = pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)
    starts = index * q.shape[1], block * k.shape[1]
    left = _left(sizes, starts)

    @pl.when((pl.program_id(2) == 0) & (index == 0))
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when(index == 0)
    def _():
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    @pl.when(meets(edges, pl.program_id(0) // heads, index, block))
    def _():
        for x, n in ((q, left[0]), (grad, left[0]), (k, left[1]), (v, left[1])):
            _clear(x, n)
        queries, grads = q[0], grad[0]
        here = pl.ds(pl.multiple_of(starts[0], LANES), q.shape[1])
        sums = dq[0, 0, :, here]
        for start in range(0, k.shape[1], compute):
            part = pl.ds(start, compute)
            keys, values = k[0, part], v[0, part]
            scores = _product(keys, queries, _LAST) - lse[0]
            weights = jnp.exp2(_hide(scores, ids, part, left[1]))
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
