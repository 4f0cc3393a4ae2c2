"""Blocks of the DiT: attention, modulated blocks, control blocks, image embedding."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jvdit.models.attention.dispatch import attention, rotate
from jvdit.models.dense import Dense
from jvdit.models.layers import (
    BLOCK_INPUT,
    LayerNorm,
    Mlp,
    Modulation,
    RMSNorm,
    modulate,
)
from jvdit.sharding import constrain


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys.

    Attributes:
        num_heads: heads; they divide the channels of the input.
        qk_norm: normalise queries and keys over all heads together.
        implementation: form of `attention`.
    """

    num_heads: int
    qk_norm: bool = True
    eps: float = 1e-6
    implementation: str = "auto"
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b s d"],
        segment: Int[Array, "b n"] | None,
        context_segment: Int[Array, "b s"] | None,
        rotation: tuple[Array, Array] | None = None,
        image: Float[Array, "b i d"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Lets the tokens of `x` attend to those of `context`.

        Args:
            x: tokens that ask.
            context: tokens that answer; `x` itself in self-attention.
            segment: clip of each asking token, or None.
            context_segment: clip of each answering token, or None.
            rotation: tables of `rope_tables` for queries and keys, or None.
            image: states of a picture, which have keys and values of their own and a
                softmax of their own; every token sees them. None: there are none.
        """
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def linear(name: str) -> Dense:
            kernel_init = nn.initializers.xavier_uniform()
            return Dense(x.shape[-1], kernel_init=kernel_init, name=name, **kinds)

        q, k, v = linear("query")(x), linear("key")(context), linear("value")(context)
        if self.qk_norm:
            q = RMSNorm(self.eps, name="query_norm", **kinds)(q)
            k = RMSNorm(self.eps, name="key_norm", **kinds)(k)
        q, k, v = (
            rearrange(y, "b n (q k) -> b n q k", q=self.num_heads) for y in (q, k, v)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        out = attention(
            q, k, v, segment, context_segment, implementation=self.implementation
        )
        if image is not None:
            k = RMSNorm(self.eps, name="image_key_norm", **kinds)(
                linear("image_key")(image)
            )
            k, v = (
                rearrange(y, "b n (q k) -> b n q k", q=self.num_heads)
                for y in (k, linear("image_value")(image))
            )
            out = out + attention(q, k, v, implementation=self.implementation)
        return linear("out")(rearrange(out, "b n q k -> b n (q k)"))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and an MLP, each a residual.

    Attributes: as in `DiT`.
    """

    num_heads: int
    ffn_width: int
    qk_norm: bool = True
    cross_norm: bool = True
    eps: float = 1e-6
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        text: Float[Array, "b s d"],
        embedding: Float[Array, "b g 6 d"],
        level: Int[Array, "b n"] | None,
        segment: Int[Array, "b n"] | None,
        text_segment: Int[Array, "b s"] | None,
        rotation: tuple[Array, Array],
        image: Float[Array, "b i d"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Updates the tokens; norms, modulation and residual sums are float32."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = checkpoint_name(x, BLOCK_INPUT)
        heads = (self.num_heads, self.qk_norm, self.eps, self.attention_implementation)
        modulation = Modulation(6, self.param_dtype, name="modulation")
        rows = modulation(embedding, level)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows
        text_by = (None, None)
        if text_segment is not None:
            # One clip a row: self-attention needs no mask, padded text still does.
            asking = jnp.ones(x.shape[:2], jnp.int32) if segment is None else segment
            text_by = (asking, text_segment)

        y = modulate(x, shift, scale, self.eps).astype(self.dtype)
        y = Attention(*heads, name="self_attention", **kinds)(
            y, y, segment, segment, rotation
        )
        x = (x + y * gate).astype(self.dtype)

        y = LayerNorm(self.eps, name="cross_norm")(x) if self.cross_norm else x
        y = Attention(*heads, name="cross_attention", **kinds)(
            y.astype(self.dtype), text, *text_by, image=image
        )
        x = x + y

        y = modulate(x, mlp_shift, mlp_scale, self.eps).astype(self.dtype)
        y = Mlp(self.ffn_width, x.shape[-1], name="mlp", **kinds)(y)
        x = (x + y * mlp_gate).astype(self.dtype)
        return constrain(x, "batch", "tokens", None)


class ScanBlock(Block):
    """A block as the body of `nn.scan`: its carry is the tokens."""

    @nn.compact
    def __call__(self, x, slot, hints, *context):
        """Updates the tokens, and adds the hint in `slot`; -1: none."""
        x = super().__call__(x, *context)
        if hints is None:
            return x, None
        hint = jax.lax.dynamic_index_in_dim(hints, slot, keepdims=False)
        return x + jnp.where(slot >= 0, hint, 0), None


class ControlBlock(Block):
    """A block beside the others, whose tokens carry a control signal (VACE).

    It is the body of `nn.scan` too; `hint` is what it says to a block of the others.
    """

    @nn.compact
    def __call__(self, x, *context):
        """Updates the control tokens; returns (tokens, hint)."""
        x = super().__call__(x, *context)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        zeros = nn.initializers.zeros_init()
        return x, Dense(x.shape[-1], kernel_init=zeros, name="hint", **kinds)(x)


class ImageEmbed(nn.Module):
    """States of an image encoder to the width of the tokens (Wan 2.1 I2V).

    Attributes:
        width: channels of a token.
        length: states that have a learned position each; 0: none has.
    """

    width: int
    length: int = 0
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "b i e"]) -> Float[Array, "b i d"]:
        """Norm, MLP with the exact GELU, norm."""
        width = states.shape[-1]
        x = states.astype(jnp.float32)
        if self.length:
            zeros = nn.initializers.zeros_init()
            shape = (self.length, width)
            position = self.param("table", zeros, shape, self.param_dtype)
            x = x + position.astype(jnp.float32)[None]
        x = LayerNorm(1e-5, self.param_dtype, name="norm_in")(x).astype(self.dtype)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gelu = partial(nn.gelu, approximate=False)
        x = Mlp(width, self.width, gelu, name="mlp", **kinds)(x)
        x = LayerNorm(1e-5, self.param_dtype, name="norm_out")(x)
        return x.astype(self.dtype)
