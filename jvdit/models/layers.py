"""Small layers that models share: norms, modulation, MLP, sinusoids, layer stacks."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jvdit.models.attention.pieces import RESIDUALS
from jvdit.models.dense import Dense, Layer, along_last
from jvdit.models.kinds import SUFFIXES
from jvdit.sharding import alone, platform

Initializer = Callable[..., Array]

# Names of layers that are stacked on a leading axis: what they are, and the number of
# the first, if it isn't 0.
_STACK = re.compile(r"(block|control)s(?:_(\d+))?")
# The name of what goes into a block, where remat may find it.
BLOCK_INPUT = "block_input"
# What a rematerialised block keeps for its backward pass; "none" keeps everything.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[RESIDUALS],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class RMSNorm(Layer):
    """Divides by the root mean square of the last axis, computed in float32.

    Attributes:
        eps: added to the mean square.
    """

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises; a learned `scale` follows (arXiv:1910.07467, eq. 4)."""
        scale = self.constant("scale", 1, x.shape[-1]).astype(jnp.float32)
        x = x.astype(jnp.float32)
        power = jnp.mean(self.squared(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(power + self.eps) * along_last(scale, x)
        return x.astype(self.dtype)

    def squared(self, x: Array) -> Array:
        """The square, whose form decides how a gradient is rounded."""
        return x * x


def layer_norm(
    x: Float[Array, "*batch d"], eps: float = 1e-6
) -> Float[Array, "*batch d"]:
    """Standardises the last axis in float32, without learned parameters."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class LayerNorm(Layer):
    """`layer_norm` with a learned `scale` and `bias`, computed in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises, scales and shifts."""
        scale, bias = (
            along_last(self.constant(*start, x.shape[-1]).astype(jnp.float32), x)
            for start in (("scale", 1), ("bias", 0))
        )
        return (layer_norm(x, self.eps) * scale + bias).astype(self.dtype)


def modulate(
    x: Float[Array, "b n d"],
    shift: Float[Array, "b #n d"],
    scale: Float[Array, "b #n d"],
    eps: float = 1e-6,
) -> Float[Array, "b n d"]:
    """Layer norm whose scale and shift come from the noise level, in float32."""
    return layer_norm(x, eps) * (1 + scale) + shift


class Modulation(Layer):
    """Shift, scale and gate rows for the tokens: AdaLN with a table (arXiv:2212.09748).

    A learned table, one row for each use, is added to an embedding of the noise level.
    That is done once for each distinct level; tokens then pick their level.

    Attributes:
        rows: how many vectors of `d` channels there are.
    """

    rows: int

    @nn.compact
    def __call__(
        self,
        embedding: Float[Array, "b g #r d"],
        level: Int[Array, "b n"] | None,
        kinds: int = 1,
    ) -> list[Float[Array, "b #n d"]]:
        """Spreads the rows over the tokens.

        Args:
            embedding: of each noise level, in float32.
            level: index of each token's level. None: there is one level.
            kinds: how many kinds of tokens there are; each has as many of the levels,
                and a table of its own.
        """
        width = embedding.shape[-1]
        init, shape = nn.initializers.normal(width**-0.5), (self.rows, width)
        names = [f"table{suffix}" for suffix in SUFFIXES[:kinds]]
        tables = [self.param(name, init, shape, self.param_dtype) for name in names]
        parts = jnp.split(embedding, kinds, axis=1) if kinds > 1 else [embedding]
        rows = [
            part + table.astype(jnp.float32)[None, None]
            for part, table in zip(parts, tables, strict=True)
        ]
        rows = jnp.concatenate(rows, axis=1) if kinds > 1 else rows[0]
        rows = [rows[:, :, i] for i in range(self.rows)]
        return rows if level is None else [_pick(row, level) for row in rows]


@jax.custom_jvp
def _pick(row: Array, level: Array) -> Array:
    """The vector of each token's level."""
    return jnp.take_along_axis(row, level[:, :, None], axis=1)


@_pick.defjvp
def _pick_tangent(primals, tangents):
    # The gradient of an indexed read is a scatter, which is slow. Written as a product
    # with the one-hot levels, the gradient is a product as well.
    row, level = primals
    tangent = jnp.einsum(
        "bng,bgd->bnd",
        jax.nn.one_hot(level, row.shape[1]),
        tangents[0],
        precision=jax.lax.Precision.HIGHEST,
    )
    return _pick(row, level), tangent


class Mlp(Layer):
    """Two linear layers, `fc_in` and `fc_out`, with an activation between.

    Attributes:
        width: channels between the two layers.
        out_width: channels of the result.
        activation: applied between the layers.
        kernel_init: initialiser of both kernels.
    """

    width: int
    out_width: int
    activation: Callable[[Array], Array] = nn.gelu
    kernel_init: Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        """Maps the last axis to `out_width` channels."""
        shared = {"kernel_init": self.kernel_init, **self.types}
        x = self.activation(Dense(self.width, name="fc_in", **shared)(x))
        return Dense(self.out_width, name="fc_out", **shared)(x)


def timestep_embedding(
    t: Float[Array, "*batch"], width: int, max_period: float = 1e4
) -> Float[Array, "*batch {width}"]:
    """Sinusoids of `t`: `width / 2` cosines, then as many sines.

    Angular frequencies fall geometrically from 1 to almost `1 / max_period`
    (arXiv:1706.03762, section 3.5), so `t` should span hundreds: scale it first.

    Raises:
        ValueError: `width` is odd.
    """
    if width % 2:
        raise ValueError(f"`width` (={width}) must be even; try {width + 1}.")
    half = width // 2
    frequency = (max_period ** (-np.arange(half) / half)).astype(np.float32)
    t = t[..., None].astype(jnp.float32)
    angle = t * along_last(frequency, t)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rematerialise(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Makes a block recompute its activations in the backward pass.

    Args:
        block: a module class.
        policy: "none", or a row of `REMAT_POLICIES`.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy == "none":
        return block
    if policy not in REMAT_POLICIES:
        known = ", ".join(["none", *REMAT_POLICIES])
        raise ValueError(f"`remat` (={policy!r}) must be one of: {known}.")
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=False)


def stack_of(name: str) -> tuple[str, int] | None:
    """What the layers of a stack are called, and the number of the first.

    Args:
        name: of the stack, such as "blocks", or "blocks_4" of those from the fifth on.

    Returns:
        Such as ("block", 4); None: the name is no stack's.
    """
    match = _STACK.fullmatch(name)
    return None if match is None else (match[1], int(match[2] or 0))


def scanned(block: type[nn.Module], length: int, in_axes: Any) -> type[nn.Module]:
    """Makes a block a stack of so many: a loop, their parameters on a leading axis.

    Args:
        block: a module class; its first argument and first result are the carry.
        length: how many blocks.
        in_axes: axis of the loop in each further argument, or `nn.broadcast`.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0, "cache": 0},
        split_rngs={"params": True, "lora": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def reused(
    module: nn.Module,
    x: Float[Array, "b n d"],
    blocks: Callable[[Any, Array], Array],
) -> Float[Array, "b n d"]:
    """Runs all blocks of a module, or adds in their place what they added last.

    The collection "reuse" tells which (`skip`), and keeps that sum (`residual`) and by
    how much it grew (`ratio`); without the collection they always run.

    Args:
        module: that has the collection and the blocks.
        x: tokens that go into the first block.
        blocks: (module, tokens) to the tokens that leave the last.
    """
    if not module.has_variable("reuse", "skip"):
        return blocks(module, x)
    before = module.get_variable("reuse", "residual")
    out = nn.cond(
        module.get_variable("reuse", "skip"),
        lambda _, x: x + before.astype(x.dtype),
        blocks,
        module,
        x,
    )
    added = (out - x).astype(before.dtype)
    size, size_before = (
        jnp.linalg.norm(y.astype(jnp.float32), axis=-1) for y in (added, before)
    )
    ratio = jnp.mean(size / (size_before + 1e-8))
    module.put_variable("reuse", "residual", added)
    module.put_variable("reuse", "ratio", ratio)
    return out


def fusion_boundary(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `x`, and keeps XLA on CPU from fusing across it, gradients included.

    In an unrolled stack of residual blocks XLA otherwise adds up the gradients of all
    later blocks again wherever one block uses their sum: a training step of six blocks
    takes a fifth longer. It fuses across `optimization_barrier`, but not across a
    conditional. The other branch, taken where `x` begins with NaN, is all NaN.
    """
    if platform() != "cpu" or not alone():
        return x
    first = x.reshape(-1)[0]
    return jax.lax.cond(
        first == first, lambda x: x, lambda x: jnp.full_like(x, jnp.nan), x
    )
