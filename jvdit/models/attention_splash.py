"""Flash attention on TPU by JAX's splash kernel, whole or in the pieces of a ring.

The kernel wants queries and keys in whole blocks, whose best size differs from chip to
chip; here they are padded, and the padding hidden by segments. Without a TPU the kernel
is interpreted, slowly.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from jvdit.models.attention_pieces import PADDING, Pieces, Segments, pad
from jvdit.sharding import platform

LANES = 128
_PALLAS = "pl"  # what the kernels' module calls Pallas


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Largest blocks of a chip, in tokens: the best of a sweep over its schedules.

    Attributes:
        q, kv, compute: of the forward kernel: queries, keys that are fetched at once,
            and of these, that are computed at once.
        back: the same of the kernel for the gradients.
    """

    q: int = 1024
    kv: int = 2048
    compute: int = 1024
    back: tuple[int, int, int] = (1024, 2048, 1024)


# By what `device_kind` contains; v5p's vector memory holds no 2,048 queries.
BLOCKS = {"v6": Blocks(q=2048)}


def _most(chip: str) -> Blocks:
    return next((b for name, b in BLOCKS.items() if name in chip), Blocks())


def suits_splash(q: Float[Array, "b n q k"], k: Float[Array, "b s q k"]) -> bool:
    """Whether the kernel takes these heads, and is worth its padding."""
    return q.shape[-1] % LANES == 0 and min(q.shape[1], k.shape[1]) >= LANES


def padded_length(tokens: int, block: int) -> int:
    """The fewest tokens that are whole blocks of at most this size, or half of it."""
    sizes = range(min(block, _whole(tokens, LANES)), block // 2 - 1, -LANES)
    return min((_whole(tokens, size) for size in sizes), default=_whole(tokens, LANES))


def _whole(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _fitting(length: int, most: int) -> int:
    """The largest block that divides a padded length."""
    return next(b for b in range(min(most, length), 0, -LANES) if length % b == 0)


def block_sizes(queries: int, keys: int, chip: str) -> kernel.BlockSizes:
    """Blocks of the two kernels for padded numbers of queries and keys.

    Args:
        queries: a multiple of 128.
        keys: a multiple of 128.
        chip: its `device_kind`.
    """
    most = _most(chip)
    q, kv = partial(_fitting, queries), partial(_fitting, keys)
    ahead, back = kv(most.kv), kv(most.back[1])
    return kernel.BlockSizes(
        block_q=q(most.q),
        block_kv=ahead,
        block_kv_compute=_fitting(ahead, most.compute),
        block_q_dkv=q(most.back[0]),
        block_kv_dkv=back,
        block_kv_dkv_compute=_fitting(back, most.back[2]),
        use_fused_bwd_kernel=True,
    )


def _chip() -> str:
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described else jax.devices()[0].device_kind


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernel is built for.

    Attributes:
        queries, keys: how many there are.
        heads: of each row.
    """

    queries: int
    keys: int
    heads: int

    @property
    def padded(self) -> tuple[int, int]:
        """Queries and keys in whole blocks."""
        most = _most(_chip())
        return padded_length(self.queries, most.q), padded_length(self.keys, most.kv)

    def kernel(self) -> Any:
        """JAX's kernel: (q, k, v, segments) of a row to its result and log-sum-exp."""
        queries, keys = self.padded
        full = masks.FullMask((queries, keys))
        return kernel.make_splash_mha(
            masks.MultiHeadMask([full] * self.heads),
            block_sizes=block_sizes(queries, keys, _chip()),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=True,
            interpret=platform() != "tpu",
        )


def _shape(q: Array, k: Array) -> _Shape:
    return _Shape(q.shape[1], k.shape[1], q.shape[2])


def _heads_first(x: Float[Array, "b n q k"], length: int) -> Float[Array, "b q N k"]:
    return pad(x.swapaxes(1, 2), 2, length)


def _segment_ids(shape: _Shape, rows: int, segments: Segments) -> Any:
    """Segments of the padded tokens; None: every query sees every key."""
    sizes, padded = (shape.queries, shape.keys), shape.padded
    if not segments:
        if padded[1] == shape.keys:
            return None
        segments = tuple(jnp.ones((rows, n), jnp.int32) for n in sizes)  # type: ignore
    ids = (pad(x, 1, n, PADDING) for x, n in zip(segments, padded, strict=True))
    return kernel.SegmentIds(*ids)


def _scaled(q: Array) -> Array:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def splash_forward(
    q: Float[Array, "b n q k"],
    k: Float[Array, "b s q k"],
    v: Float[Array, "b s q k"],
    segments: Segments,
) -> tuple[Float[Array, "b n q k"], Float[Array, "b q n"]]:
    """Attention to some of the keys; see `attention_pieces.Pieces.forward`."""
    shape = _shape(q, k)
    queries, keys = shape.padded
    ids = _segment_ids(shape, len(q), segments)
    made = shape.kernel()
    inputs = (
        _heads_first(_scaled(q), queries),
        _heads_first(k, keys),
        _heads_first(v, keys),
        ids,
    )
    with _on_both_cores(1):
        out, (lse,) = jax.lax.map(lambda row: made(*row), inputs)
    return out.swapaxes(1, 2)[:, : shape.queries], lse[..., : shape.queries]


def splash_backward(
    q: Float[Array, "b n q k"],
    k: Float[Array, "b s q k"],
    v: Float[Array, "b s q k"],
    segments: Segments,
    lse: Float[Array, "b q n"],
    slope: Float[Array, "b q n"],
    grad: Float[Array, "b n q k"],
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v; see `attention_pieces.Pieces.backward`.

    JAX's kernel is differentiable as a whole only. Its backward kernel, which takes the
    log-sum-exp of whatever keys there are, has no public name. It makes a gradient of
    the queries for each block of keys, as large as the queries every time: so heads
    come one after another.
    """
    shape = _shape(q, k)
    queries, keys = shape.padded
    made = dataclasses.replace(shape, heads=1).kernel()
    ids = _segment_ids(shape, len(q), segments)
    blocks = made.kwargs["block_sizes"]
    names = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")
    shared = {name: made.kwargs[name] for name in (*names, "interpret")}
    shared |= {f"{x}_layout": getattr(blocks, f"{x}_layout") for x in "qkv"}

    def head(arrays, ids):
        q, k, v, slope, lse, grad = (x[None] for x in arrays)
        grads = kernel._splash_attention_bwd_dkv(
            *(q, k, v, ids, None, lse, grad, slope),
            bq=blocks.block_q_dkv,
            bkv=blocks.block_kv_dkv,
            bkv_compute=blocks.block_kv_dkv_compute,
            mask_info=made.dkv_mask_info,
            use_fused_bwd_kernel=True,
            **shared,
        )
        return jax.tree.map(lambda x: x[0], grads)

    def row(inputs):
        arrays, ids = inputs
        return jax.lax.map(lambda x: head(x, ids), arrays)

    arrays = (
        _heads_first(_scaled(q), queries),
        _heads_first(k, keys),
        _heads_first(v, keys),
        pad(slope, 2, queries),
        pad(lse, 2, queries),
        _heads_first(grad, queries),
    )
    with _on_both_cores(0):
        dq, dk, dv = jax.lax.map(row, (arrays, ids))
    dq = dq.astype(jnp.float32) * q.shape[-1] ** -0.5
    sizes = shape.queries, shape.keys, shape.keys
    return tuple(  # type: ignore[return-value]
        x.swapaxes(1, 2)[:, :n] for x, n in zip((dq, dk, dv), sizes, strict=True)
    )


class _Pallas:
    """Pallas, but for what JAX's kernels don't tell the compiler.

    How the grid of a kernel is divided, see `_on_both_cores`; and what it costs, so
    that transfers are planned behind it: else it counts as nothing.
    """

    def __init__(self, axis: int):
        order = ["arbitrary"] * 3
        order[axis] = "parallel"
        self._order = pltpu.CompilerParams(dimension_semantics=order)
        self._products = 2 if axis else 5

    def __getattr__(self, name: str) -> Any:
        return getattr(pl, name)

    def pallas_call(self, body: Any, **settings: Any) -> Any:  # noqa: D102
        settings |= {"compiler_params": self._order}

        def call(*inputs: Any) -> Any:
            run = pl.pallas_call(body, cost_estimate=self._cost(inputs), **settings)
            return [_added(x) if _by_block(x) else x for x in run(*inputs)]

        return call

    def _cost(self, inputs: Any) -> pl.CostEstimate:
        arrays = [x for x in inputs if x is not None]
        q, k = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)][:2]
        scores = q.shape[0] * q.shape[1] * k.shape[1]
        return pl.CostEstimate(
            flops=self._products * 2 * scores * q.shape[2],
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )


def _by_block(x: Any) -> bool:
    """Whether these are gradients of the queries, for each block of keys."""
    return x is not None and x.ndim == 4


def _added(x: Float[Array, "blocks q n k"]) -> Float[Array, "1 q n k"]:
    """Their sum, addition by addition: XLA's for TPUs reads a plain one badly.

    Of 37 blocks for 75,776 queries it expects 0.5 ms of a v6e chip in the place of 4.9.
    """
    parts = (part.astype(jnp.float32) for part in x)
    return functools.reduce(operator.add, parts).astype(x.dtype)[None]


@contextlib.contextmanager
def _on_both_cores(axis: int) -> Iterator[None]:
    """Divides the grid of a kernel over the two cores of a v5p chip.

    JAX's kernels divide their heads, or nothing: a mask could make a block skip others,
    and several heads could share their keys. Here no block is skipped, and heads are
    few: blocks of queries (forward) and of keys (backward) divide more evenly.

    Args:
        axis: of the grid, along which these blocks lie.
    """
    setattr(kernel, _PALLAS, _Pallas(axis))
    try:
        yield
    finally:
        setattr(kernel, _PALLAS, pl)


def _padded(tokens: int) -> int:
    return padded_length(tokens, _most(_chip()).kv)


SPLASH = Pieces(splash_forward, splash_backward, _padded)
