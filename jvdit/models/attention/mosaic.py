"""Flash attention on TPU, whole or in the pieces of a ring: what the kernels are given.

They take queries and keys in blocks, whose best size differs from chip to chip; of the
last one they leave out what isn't there. Without a TPU they are interpreted, slowly.
"""

import functools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jvdit.machine.chips import Blocks, this_chip
from jvdit.models.attention import kernels
from jvdit.models.attention.kernels import LANES
from jvdit.models.attention.pieces import (
    Keys,
    Pieces,
    Queries,
    Sums,
    edges,
    meets,
    pad,
)
from jvdit.shapes import Visible
from jvdit.sharding import platform

_PADDING = np.iinfo(np.int32).min  # an id below every bound
_GRADIENT = 2 * 4  # bytes of a number in float32, and of its copy on the way out


def _blocks() -> Blocks:
    return this_chip().blocks


def obstacle(channels: int, tokens: int) -> str:
    """Why the kernels can't be used; "": they can.

    Args:
        channels: of a head.
        tokens: queries or keys, whichever are fewer: they must fill a block.
    """
    if channels % LANES:
        return f"heads of {channels} channels, which aren't a multiple of {LANES}"
    return f"{tokens} tokens, fewer than {LANES}" if tokens < LANES else ""


def suits_mosaic(q: Queries, k: Keys) -> bool:
    """Whether the kernels can be used for these heads and tokens."""
    return not obstacle(q.shape[-1], min(q.shape[1], k.shape[1]))


def warn_of_heads(width: int, num_heads: int, tokens: int) -> None:
    """Warns, on TPUs and once, of heads that keep many tokens from the kernels."""
    why = obstacle(width // num_heads, tokens)
    if platform() == "tpu" and tokens >= LANES and why:
        remedy = f"`width` (={width}) must be a multiple of {LANES} for any to suit"
        if width % LANES == 0:
            fits = [n for n in range(1, width // LANES + 1) if width // LANES % n == 0]
            near = min(fits, key=lambda n: abs(math.log(n / num_heads)))
            remedy = f"`num_heads` (={num_heads}) could be {near}"
        _warn(
            f"no flash attention on TPUs for {why}: expect a step to take several "
            f"times as long; {remedy}."
        )


@functools.cache
def _warn(message: str) -> None:
    logging.warning("%s", message)


def block_for(tokens: int, most: int) -> int:
    """The block, of at least half of the most, that leaves the fewest places empty."""
    most = min(most, _whole(tokens, LANES))
    sizes = range(most, most // 2 - 1, -LANES)
    return min(sizes, key=lambda size: _whole(tokens, size))


def _whole(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _at_once(block: int, most: int) -> int:
    """The largest part of whole lanes that divides a block."""
    return next(n for n in range(min(most, block), 0, -LANES) if block % n == 0)


def _ragged(tokens: int, block: int) -> int | None:
    """How many tokens there are, unless they are whole blocks."""
    return tokens if tokens % block else None


def _lines(x: Queries) -> Float[Array, "r n k"]:
    """Heads of all rows, one after another."""
    x = x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _rows(x: Float[Array, "r n k"], rows: int) -> Queries:
    return x.reshape(rows, -1, *x.shape[1:]).swapaxes(1, 2)


def _scaled(q: Array) -> Array:
    scale = q.shape[-1] ** -0.5 / kernels.LN2
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


def _ids(visible: Visible | None, held: int) -> list[Array]:
    """Ids of keys in whole blocks and all lanes, and the bounds of queries."""
    if visible is None:
        return []
    id = pad(visible.id, 1, _whole(visible.id.shape[1], held), _PADDING)
    bounds = [x[:, None] for x in visible[1:] if x is not None]
    return [jnp.broadcast_to(id[..., None], (*id.shape, LANES)), *bounds]


def _block(at: Any, axis: int, *shape: int, each: int = 1) -> pl.BlockSpec:
    """A block of tokens of a head.

    Args:
        at: which block of tokens, from the place in the grid and the edges of blocks.
        axis: that of the tokens.
        *shape: of the block.
        each: heads that share it.
    """

    def place(*grid: Any) -> tuple[Any, ...]:
        index = [grid[0] // each, 0, 0]
        index[axis] = at(*grid)
        return tuple(index)

    return pl.BlockSpec((1, *shape), place)


def _if_seen(block: Any, edges: Any, row: Any, i: Any, j: Any) -> Any:
    """A block to fetch; the first, which may be there, where nothing is visible."""
    return jnp.where(meets(edges, row, i, j), block, 0) if edges else block


def _run(kernel: Any, edges: list[Array], inputs: Any, grid: Any, **settings: Any):
    """Runs a kernel, which has the edges of blocks before it fetches any of them."""

    def run(*refs: Any) -> None:
        kernel(refs[: len(edges)], *refs[len(edges) :])

    spec = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(edges), **grid)
    return pl.pallas_call(run, grid_spec=spec, **settings)(*edges, *inputs)


def _settings(products: int, q: Array, k: Array, axes: int) -> dict[str, Any]:
    """Of a kernel: the axis of the grid that cores divide, its memory and its cost.

    Without a cost it counts as nothing, and no transfer is planned behind it.
    """
    order = ["arbitrary"] * axes
    order[1] = "parallel"
    scores = q.shape[0] * q.shape[1] * k.shape[1]
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=_blocks().memory
        ),
        "cost_estimate": pl.CostEstimate(
            flops=products * 2 * scores * q.shape[2],
            transcendentals=scores,
            bytes_accessed=products * (q.size + k.size) * q.dtype.itemsize,
        ),
        "interpret": platform() != "tpu",
    }


def mosaic_forward(
    q: Queries, k: Keys, v: Keys, visible: Visible | None
) -> tuple[Queries, Sums]:
    """Attention to some of the keys; see `pieces.Pieces.forward`."""
    rows, tokens, heads, channels = q.shape
    keys, most = k.shape[1], _blocks().ahead
    block, held = block_for(tokens, most[0]), block_for(keys, most[1])
    ids, ends = _ids(visible, held), edges(visible, block, held)
    q, k, v = map(_lines, (q, k, v))
    of_query = partial(_block, lambda h, i, j, *_: i)
    of_key = partial(_block, lambda h, i, j, *e: _if_seen(j, e, h // heads, i, j))
    column = of_key(1, held, channels)
    bounds = of_query(2, 1, block, each=heads)
    shared = [of_key(1, held, LANES, each=heads), bounds, bounds]
    kernel = partial(
        kernels.forward,
        compute=_at_once(held, most[2]),
        sizes=(_ragged(tokens, block), _ragged(keys, held)),
        heads=heads,
    )
    grid = {
        "grid": (len(q), pl.cdiv(tokens, block), pl.cdiv(keys, held)),
        "in_specs": [of_query(1, block, channels), column, column, *shared[: len(ids)]],
        "out_specs": [of_query(1, block, channels), of_query(2, 1, block)],
        "scratch_shapes": [
            pltpu.VMEM((n, block), jnp.float32) for n in (1, 1, channels)
        ],
    }
    shapes = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((len(q), 1, tokens), jnp.float32),
    ]
    settings = {"name": "flash_forward", "out_shape": shapes, **_settings(2, q, k, 3)}
    out, lse = _run(kernel, ends, (_scaled(q), k, v, *ids), grid, **settings)
    return _rows(out, rows), lse.reshape(rows, heads, tokens)


def mosaic_backward(
    q: Queries,
    k: Keys,
    v: Keys,
    visible: Visible | None,
    lse: Sums,
    slope: Sums,
    grad: Queries,
) -> tuple[Queries, Keys, Keys]:
    """Gradients of q, k, v; see `pieces.Pieces.backward`."""
    rows, tokens, heads, channels = q.shape
    chip = _blocks()
    # Of so many queries a core has room for the gradients.
    block = block_for(tokens, chip.back[0])
    part = max(chip.gradients // (_GRADIENT * channels) // block, 1) * block
    q, k, v, grad = map(_lines, (q, k, v, grad))
    lse, slope = (x.reshape(-1, 1, tokens) for x in (lse / kernels.LN2, slope))
    found = []
    for start in range(0, tokens, part):
        here = slice(start, start + part)
        seen = visible
        if visible is not None:
            seen = jax.tree.map(lambda x, at=here: x[:, at], visible).among(visible.id)
        queries = q[:, here], grad[:, here], lse[..., here], slope[..., here]
        found.append(_backward(*queries, k, v, seen, heads))
    dq, dk, dv = zip(*found, strict=True)
    dq = jnp.concatenate(dq, axis=1)
    return tuple(_rows(x, rows) for x in (dq, sum(dk), sum(dv)))  # type: ignore


def _backward(
    q: Float[Array, "r n k"],
    grad: Float[Array, "r n k"],
    lse: Float[Array, "r 1 n"],
    slope: Float[Array, "r 1 n"],
    k: Float[Array, "r s k"],
    v: Float[Array, "r s k"],
    visible: Visible | None,
    heads: int,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, of which a core holds all, and of keys and values."""
    (lines, tokens, channels), keys, most = q.shape, k.shape[1], _blocks().back
    cores, blocks, held = _share(keys)
    block = block_for(tokens, most[0])
    padded = _whole(tokens, block)
    ids, ends = _ids(visible, held), edges(visible, block, held)
    of_query = partial(
        _block,
        lambda h, core, j, i, *e: _if_seen(i, e, h // heads, i, core * blocks + j),
    )
    of_key = partial(_block, lambda h, core, j, i, *_: core * blocks + j)
    row, line = of_query(1, block, channels), of_query(2, 1, block)
    column = of_key(1, held, channels)
    bounds = of_query(2, 1, block, each=heads)
    shared = [of_key(1, held, LANES, each=heads), bounds, bounds]
    kernel = partial(
        kernels.backward,
        compute=_at_once(held, most[2]),
        sizes=(_ragged(tokens, block), _ragged(keys, held)),
        heads=heads,
    )
    all_queries = pl.BlockSpec(
        (1, 1, channels, padded), lambda h, core, j, i, *_: (core, h, 0, 0)
    )
    grid = {
        "grid": (lines, cores, blocks, padded // block),
        "in_specs": [row, column, column, row, line, line, *shared[: len(ids)]],
        "out_specs": [all_queries, column, column],
        "scratch_shapes": [pltpu.VMEM((channels, held), jnp.float32) for _ in range(2)],
    }
    shapes = [
        jax.ShapeDtypeStruct((cores, lines, channels, padded), jnp.float32),
        jax.ShapeDtypeStruct(k.shape, k.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype),
    ]
    settings = {"name": "flash_backward", "out_shape": shapes, **_settings(5, q, k, 4)}
    inputs = _scaled(q), k, v, grad, *(pad(x, 2, padded) for x in (lse, slope)), *ids
    dq, dk, dv = _run(kernel, ends, inputs, grid, **settings)
    dq = (dq.sum(axis=0) * channels**-0.5).astype(q.dtype)
    return dq[..., :tokens].swapaxes(1, 2), dk, dv


def _share(keys: int) -> tuple[int, int, int]:
    """Cores that share keys, blocks of them that each has, and the size of a block."""
    chip = _blocks()
    for cores in (chip.cores, 1):
        each = pl.cdiv(keys, cores)
        held = block_for(each, chip.back[1])
        blocks = pl.cdiv(each, held)
        if (cores * blocks - 1) * held < keys:  # else the last block would be empty
            break
    return cores, blocks, held


MOSAIC = Pieces(mosaic_forward, mosaic_backward)
