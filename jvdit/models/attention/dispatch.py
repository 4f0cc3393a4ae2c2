"""Attention over packed tokens, and rotary positions in three dimensions.

`attention` is one function with several forms: the fastest differs by backend.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.attention.mosaic import MOSAIC, suits_mosaic
from jvdit.models.attention.parallel import divided
from jvdit.models.attention.patterns import PATTERNS
from jvdit.models.attention.pieces import (
    DENSE,
    STEADY,
    Keys,
    Pieces,
    Queries,
    flash,
    pad,
)
from jvdit.models.attention.tiles import sparse
from jvdit.shapes import Visible
from jvdit.sharding import alone, platform

IMPLEMENTATIONS = ("auto", "mapped", "steady", "xla", "cudnn", "mosaic")
KEYS = ("tokens", "text")
PIECES = {"mapped": DENSE, "steady": STEADY, "mosaic": MOSAIC}

# Scores of a head up to which they stay in a processor's cache without being mapped.
FEW_SCORES = 192**2
FLASH_SCORES = 512**2  # from which a flash kernel pays on a GPU


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    visible: Visible | None = None,
    *,
    keys: str = "tokens",
    implementation: str = "auto",
    pattern: str = "full",
    frames: int = 0,
) -> Queries:
    """Softmax attention of each query to the keys that it sees.

    Scores are divided by the root of the head's channels; the softmax is float32. A
    query that sees no key gets zeros.

    Args:
        q: queries; the heads are the third axis.
        k: keys.
        v: values.
        visible: which keys each query sees. None: all.
        keys: how a mesh divides the keys: "tokens", as the queries; "text", not at
            all: they are few, and a rematerialised block attends to them again.
        implementation: "mapped", one head of one row at a time, recomputed in the
            backward pass (CPU); "steady", the same, of which a query has the same bits
            whatever else is in its row; "xla", plain; "cudnn", GPU flash attention
            in half precision; "mosaic", TPU flash attention; "auto", the best of
            them on this backend. On a mesh, what each device does with its part
            (`parallel`).
        pattern: that of self-attention by which `visible` hides most of the keys.
        frames: of the one clip, in order, that each row is exactly, all with the same
            cells in the same order; 0: rows are not, or differ.

    Raises:
        ValueError: the form, the pattern, or the name of the keys' axis is unknown.
    """
    for name, value, known in (
        ("implementation", implementation, IMPLEMENTATIONS),
        ("keys", keys, KEYS),
        ("pattern", pattern, PATTERNS),
    ):
        if value not in known:
            raise ValueError(f"`{name}` (={value!r}) must be in: {', '.join(known)}.")
    local = partial(_local, implementation, keys == "tokens", pattern, frames)
    if alone():
        return local(q, k, v, visible)
    fast = platform() == "tpu" and suits_mosaic(q, k)
    form = implementation if implementation in PIECES else "mapped"
    pieces = _pieces("mosaic" if fast else form, pattern)
    return divided(local, pieces, q, k, v, visible, keys)


def _pieces(form: str, pattern: str) -> Pieces:
    """The two passes of a form, which leave out what a pattern hides."""
    pieces, row = PIECES[form], PATTERNS[pattern]
    return pieces if row.rule is None else sparse(pieces, row.sorts)


def _local(
    form: Any,
    keep: bool,
    pattern: str,
    frames: int,
    q: Array,
    k: Array,
    v: Array,
    visible: Visible | None,
) -> Array:
    """Attention on one device."""
    if frames and (folded := PATTERNS[pattern].folded):
        grid = {"f": frames, "b": len(q)}
        q, k, v = (rearrange(x, f"b (f s) q k -> {folded}", **grid) for x in (q, k, v))
        form = "auto" if form == "mosaic" and not suits_mosaic(q, k) else form
        out = _local(form, keep, "full", 0, q, k, v, None)
        return rearrange(out, f"{folded} -> b (f s) q k", **grid)
    form = _best_implementation(q, k) if form == "auto" else form
    if form in PIECES:
        return flash(q, k, v, visible, _pieces(form, pattern), keep)
    n, s, seen = q.shape[1], k.shape[1], visible
    lengths: dict[str, Array] = {}
    if form == "cudnn" and (n % 2 or s % 2):
        # cuDNN takes even lengths: others get one more of padding.
        q, k, v, seen = jax.tree.map(
            lambda x: pad(x, 1, x.shape[1] + x.shape[1] % 2), (q, k, v, visible)
        )
        lengths["query_seq_lengths"] = jnp.full(len(q), n, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(len(k), s, jnp.int32)
    mask = None if seen is None else seen.mask()[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, implementation=form, **lengths
    )[:, :n]
    if visible is not None:
        out = jnp.where(visible.mask().any(axis=-1)[:, :, None, None], out, 0)
    return out


def _best_implementation(q: Array, k: Array) -> str:
    backend = platform()
    if backend == "cpu":
        return "mapped" if q.shape[1] * k.shape[1] > FEW_SCORES else "xla"
    # cuDNN's flash kernel takes half precision and heads of a multiple of 8 channels;
    # it pays where there are many scores (0.20 ms to 0.09 at 80 x 80, 0.82 to 0.76 at
    # 320 x 320 on an H200).
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    many = q.shape[1] * k.shape[1] > FLASH_SCORES
    if backend == "gpu" and half and fits and many:
        return "cudnn"
    return "mosaic" if backend == "tpu" and suits_mosaic(q, k) else "xla"


def wan_axes_dims(head_dim: int) -> tuple[int, int, int]:
    """Wan's split of a head's channels over (t, y, x): 44, 42, 42 of 128.

    Raises:
        ValueError: the head has an odd number of channels.
    """
    if head_dim % 2:
        raise ValueError(f"head dim (={head_dim}) must be even; try {head_dim + 1}.")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(
    position: Float[Array, "b n a"],
    axes_dims: Sequence[int],
    theta: float = 1e4,
    scale: Sequence[float] | None = None,
) -> tuple[Float[Array, "b n k"], Float[Array, "b n k"]]:
    """Cosines and sines of the rotary angles, accurate at far positions too.

    Channel pair i of an axis with d channels turns by `theta ** (-2 i / d)` radians
    for each unit of position (arXiv:2104.09864, eq. 15). A float32 product would lose
    `position * 6e-8` radians; here the error stays near 1e-6 up to positions of 1e5.

    Args:
        position: coordinates along each axis, in any unit.
        axes_dims: channels given to each axis, even numbers.
        theta: base of the wavelengths.
        scale: multiplies the positions along each axis. Default: 1.

    Returns:
        For every channel the cosine of its pair's angle, and the sine: negative at the
        first channel of a pair, as `rotate` takes it.

    Raises:
        ValueError: a number of channels is odd, or there isn't one for each axis.
    """
    if len(axes_dims) != position.shape[-1] or any(dim % 2 for dim in axes_dims):
        raise ValueError(
            f"`axes_dims` (={tuple(axes_dims)}) must be {position.shape[-1]} even "
            "numbers, one for each axis of the positions."
        )
    scale = [1.0] * len(axes_dims) if scale is None else scale
    turns = []
    for axis, (dim, unit) in enumerate(zip(axes_dims, scale, strict=True)):
        frequency = unit * theta ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
        turns.append(_turns(position[..., axis], frequency))
    angle = 2 * np.pi * jnp.concatenate(turns, axis=-1)
    # Both channels of a pair get its values by a product: XLA would fuse an indexed
    # read, and the sinusoids with it, into every head of every layer.
    pair = np.repeat(np.eye(angle.shape[-1], dtype=np.float32), 2, axis=1)
    sign = np.tile(np.float32([-1, 1]), angle.shape[-1])
    spread = partial(jnp.einsum, "bnp,pk->bnk", precision=jax.lax.Precision.HIGHEST)
    return spread(jnp.cos(angle), pair), spread(jnp.sin(angle), pair * sign[None])


def _turns(
    position: Float[Array, "b n"], frequency: np.ndarray
) -> Float[Array, "b n k"]:
    """The fraction of a turn in `position * frequency`, within [-1, 1].

    Both factors are cut into pieces of 12 bits, whose products float32 holds exactly;
    whole turns are dropped from each product before they are added.
    """
    position = position.astype(jnp.float32)
    high = jax.lax.reduce_precision(position, exponent_bits=8, mantissa_bits=11)
    total = jnp.zeros((*position.shape, len(frequency)), jnp.float32)
    for _ in range(3):
        exponent = np.exp2(11 - np.floor(np.log2(np.abs(frequency) + 1e-300)))
        piece = np.round(frequency * exponent) / exponent
        frequency = frequency - piece
        for part in (high, position - high):
            product = part[..., None] * piece.astype(np.float32)[None, None]
            total = total + (product - jnp.round(product))
    return total - jnp.round(total)


def rotate(
    x: Float[Array, "b n q k"],
    cos: Float[Array, "b n k"],
    sin: Float[Array, "b n k"],
) -> Float[Array, "b n q k"]:
    """Turns each pair of neighbouring channels (2i, 2i + 1) of every head, in float32.

    Args:
        x: queries or keys.
        cos: from `rope_tables`.
        sin: from `rope_tables`, with alternating sign.
    """
    if platform() == "tpu":
        # Else the compiler turns the layout around in float32: 0.2 of 7.6 s of a
        # training step of Wan 14B.
        x = jax.lax.optimization_barrier(x)
        cos, sin = cos[:, :, None], sin[:, :, None]
        turned = (x.astype(jnp.float32) * cos + _swapped(x) * sin).astype(x.dtype)
        return jax.lax.optimization_barrier(turned)
    pairs = rearrange(x.astype(jnp.float32), "b n q (p c) -> b n q p c", c=2)
    cos, sin = (rearrange(y, "b n (p c) -> b n 1 p c", c=2) for y in (cos, sin))
    turned = pairs * cos + pairs[..., ::-1] * sin
    return rearrange(turned, "b n q p c -> b n q (p c)").astype(x.dtype)


def _swapped(x: Float[Array, "b n q k"]) -> Float[Array, "b n q k"]:
    """The channels of each pair in turned order, by a product, in float32.

    A TPU holds the last axis in 128 lanes. With an axis of two channels most of these
    stay empty: there the rotation took 2.7 of the 8 s of a sampling step of Wan 14B.
    """
    channels = np.arange(x.shape[-1])
    swap = jnp.asarray(channels[:, None] == (channels ^ 1)[None], x.dtype)
    return jnp.einsum(
        "bnqk,kl->bnql",
        x,
        swap,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
