"""Attention written out in float64, what it sees, and how far float32 may be off."""

import jax.numpy as jnp
import numpy as np

from jvdit.shapes import Visible


def clips(queries, keys):
    """Clip of each query and key [b n] -> the rule that says so, and a naive mask."""
    visible = Visible(*(jnp.asarray(x, jnp.int32) for x in (keys, queries)))
    return visible, queries[:, :, None] == keys[:, None, :]


def chunks(queries, keys, length=3):
    """The same where tokens don't see later chunks of so many tokens of their row."""
    now, then = (np.arange(x.shape[1])[None] // length for x in (queries, keys))
    first = 1000 * queries
    ids = 1000 * keys + then, first, first + now
    visible = Visible(*(jnp.asarray(x, jnp.int32) for x in ids))
    return visible, clips(queries, keys)[1] & (then[:, None, :] <= now[:, :, None])


def everything(queries, keys):
    """Nothing is hidden."""
    return None, np.ones((*queries.shape, keys.shape[1]), bool)


PATTERNS = [everything, clips, chunks]


def exact(q, k, v, slope, visible):
    """The result, and its derivatives along `slope` by queries, keys and values."""
    q, k, v, slope = (np.asarray(x, np.float64) for x in (q, k, v, slope))
    root = np.sqrt(q.shape[-1])
    scores = np.einsum("bnqk,bsqk->bnqs", q, k) / root
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * visible[:, :, None]
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    out = np.einsum("bnqs,bsqk->bnqk", weights, v)
    change = np.einsum("bnqk,bsqk->bnqs", slope, v)
    change = weights * (change - (weights * change).sum(-1, keepdims=True)) / root
    return (
        out,
        np.einsum("bnqs,bsqk->bnqk", change, k),
        np.einsum("bnqs,bnqk->bsqk", change, q),
        np.einsum("bnqs,bnqk->bsqk", weights, slope),
    )


def roundings(q, k):
    """Those of float32: what a score errs by is relative in its exponential.

    A score errs by about one of its terms' sizes; a weight has it twice, with the sum
    that it is divided by, and in a derivative there are two weights.
    """
    sizes = np.einsum("bnqk,bsqk->bnqs", np.abs(q), np.abs(k)) / np.sqrt(q.shape[-1])
    return 64 + 4 * sizes.max()
