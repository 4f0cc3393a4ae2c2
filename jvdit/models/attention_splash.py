"""Flash attention on TPU by JAX's splash kernel, whole or in the pieces of a ring.

The kernel wants queries and keys in whole blocks, whose best size differs from chip to
chip; here they are padded, and the padding hidden by segments. Without a TPU the kernel
is interpreted, slowly.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from jvdit.models.attention_pieces import Pieces, Segments
from jvdit.sharding import platform

LANES = 128
PADDING = -1  # a segment of its own
_PALLAS = "pltpu"  # what the kernels' module calls Pallas' for TPUs


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Largest blocks of a chip, in tokens: the best of a sweep over its schedules.

    Attributes:
        q, kv, compute: of the forward kernel: queries, keys that are fetched at once,
            and of these, that are computed at once.
        dkv: the same of the kernel for the gradients of keys and values.
        dq: queries and keys of the kernel for the gradient of queries.
    """

    q: int = 1024
    kv: int = 2048
    compute: int = 1024
    dkv: tuple[int, int, int] = (1024, 2048, 1024)
    dq: tuple[int, int] = (1024, 2048)


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
    """Blocks of the three kernels for padded numbers of queries and keys.

    Args:
        queries: a multiple of 128.
        keys: a multiple of 128.
        chip: its `device_kind`.
    """
    most = _most(chip)
    q, kv = partial(_fitting, queries), partial(_fitting, keys)
    ahead, dkv_ahead = kv(most.kv), kv(most.dkv[1])
    return kernel.BlockSizes(
        block_q=q(most.q),
        block_kv=ahead,
        block_kv_compute=_fitting(ahead, most.compute),
        block_q_dkv=q(most.dkv[0]),
        block_kv_dkv=dkv_ahead,
        block_kv_dkv_compute=_fitting(dkv_ahead, most.dkv[2]),
        block_q_dq=q(most.dq[0]),
        block_kv_dq=kv(most.dq[1]),
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


def _pad(x: Array, axis: int, length: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _heads_first(x: Float[Array, "b n q k"], length: int) -> Float[Array, "b q N k"]:
    return _pad(x.swapaxes(1, 2), 2, length)


def _segment_ids(shape: _Shape, rows: int, segments: Segments) -> Any:
    """Segments of the padded tokens; None: every query sees every key."""
    sizes, padded = (shape.queries, shape.keys), shape.padded
    if not segments:
        if padded[1] == shape.keys:
            return None
        segments = tuple(jnp.ones((rows, n), jnp.int32) for n in sizes)  # type: ignore
    ids = (_pad(x, 1, n, PADDING) for x, n in zip(segments, padded, strict=True))
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
    run = jax.vmap(shape.kernel(), (0, 0, 0, None if ids is None else 0))
    out, (lse,) = run(
        _heads_first(_scaled(q), queries),
        _heads_first(k, keys),
        _heads_first(v, keys),
        ids,
    )
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

    JAX's kernel is differentiable as a whole only. Its two backward kernels, which
    take the log-sum-exp of whatever keys there are, have no public names.
    """
    shape = _shape(q, k)
    queries, keys = shape.padded
    made = shape.kernel()
    ids = _segment_ids(shape, len(q), segments)
    blocks = made.kwargs["block_sizes"]
    names = ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")
    shared = {name: made.kwargs[name] for name in (*names, "interpret")}
    shared |= {f"{x}_layout": getattr(blocks, f"{x}_layout") for x in "qkv"}

    def row(q, k, v, ids, slope, lse, grad):
        inputs = q, k, v, ids, None, lse, grad, slope
        with _heads_on_both_cores(1):
            _, dk, dv = kernel._splash_attention_bwd_dkv(
                *inputs,
                bq=blocks.block_q_dkv,
                bkv=blocks.block_kv_dkv,
                bkv_compute=blocks.block_kv_dkv_compute,
                mask_info=made.dkv_mask_info,
                use_fused_bwd_kernel=False,
                **shared,
            )
        with _heads_on_both_cores(0):
            dq = kernel._splash_attention_bwd_dq(
                *inputs,
                bq=blocks.block_q_dq,
                bkv=blocks.block_kv_dq,
                mask_info=made.dq_mask_info,
                **shared,
            )
        return dq, dk, dv

    dq, dk, dv = jax.vmap(row, (0, 0, 0, None if ids is None else 0, 0, 0, 0))(
        _heads_first(_scaled(q), queries),
        _heads_first(k, keys),
        _heads_first(v, keys),
        ids,
        _pad(slope, 2, queries),
        _pad(lse, 2, queries),
        _heads_first(grad, queries),
    )
    dq = dq.astype(jnp.float32) * q.shape[-1] ** -0.5
    sizes = shape.queries, shape.keys, shape.keys
    return tuple(  # type: ignore[return-value]
        x.swapaxes(1, 2)[:, :n] for x, n in zip((dq, dk, dv), sizes, strict=True)
    )


class _Ordered:
    """Pallas' module for TPUs, but for the order in which a kernel's grid may run."""

    def __init__(self, module: Any, order: tuple[str, ...]):
        self._module, self._order = module, order

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def CompilerParams(self, **settings: Any) -> Any:  # noqa: N802, D102
        settings["dimension_semantics"] = self._order
        return self._module.CompilerParams(**settings)


@contextlib.contextmanager
def _heads_on_both_cores(axis: int) -> Iterator[None]:
    """Divides the heads of a backward kernel over the two cores of a v5p chip.

    JAX has its backward kernels go through their whole grid in order, since heads that
    share their keys add up there; ours have keys of their own. The forward kernel
    divides its heads in the same way.

    Args:
        axis: of the grid, along which the heads lie.
    """
    plain = getattr(kernel, _PALLAS)
    order = tuple("parallel" if i == axis else "arbitrary" for i in range(3))
    setattr(kernel, _PALLAS, _Ordered(plain, order))
    try:
        yield
    finally:
        setattr(kernel, _PALLAS, plain)


SPLASH = Pieces(splash_forward, splash_backward)
