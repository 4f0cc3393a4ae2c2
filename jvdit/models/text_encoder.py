"""T5 v1.1 and UMT5 text encoder (arXiv:1910.10683, arXiv:2304.09151)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jvdit.models.dense import Dense, Layer
from jvdit.models.layers import RMSNorm, scanned
from jvdit.shapes import Visible
from jvdit.sharding import constrain

_XXL = {
    "width": 4096,
    "depth": 24,
    "num_heads": 64,
    "head_dim": 64,
    "ffn_width": 10240,
}

# Sizes by name: `TextEncoder(**VARIANTS[name])`. Rows without a vocabulary belong to
# our own models, where the tokenizer decides it.
VARIANTS: dict[str, dict[str, Any]] = {
    "umt5-xxl": _XXL | {"vocab_size": 256384, "shared_bias": False},
    "t5-v1.1-xxl": _XXL | {"vocab_size": 32128, "shared_bias": True},
    "world": {
        "width": 128,
        "depth": 2,
        "num_heads": 4,
        "head_dim": 32,
        "ffn_width": 384,
    },
    "tiny": {"width": 32, "depth": 2, "num_heads": 2, "head_dim": 16, "ffn_width": 48},
}


def relative_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "s s"]:
    """The bucket of every offset from a query (row) to a key (column).

    Half of the buckets are for keys ahead. Of each half, the first half counts single
    offsets, the rest grow geometrically to `max_distance`; farther ones share the last.

    Raises:
        ValueError: `num_buckets` is not a multiple of 4, or too large for the distance.
    """
    if num_buckets % 4 or max_distance <= num_buckets // 4:
        raise ValueError(
            f"`num_buckets` (={num_buckets}) must be a multiple of 4, and below four "
            f"times `max_distance` (={max_distance}); try 32 and 128."
        )
    side, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32 as in the reference: distances on a bucket's edge must round alike.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + ratio.astype(np.int32), side - 1)
    bucket = np.where(distance < exact, distance, far)
    return (bucket + side * (offset > 0)).astype(np.int32)


class RelativeBias(Layer):
    """A learned score for each head and bucket of relative position."""

    num_heads: int
    num_buckets: int
    max_distance: int

    @nn.compact
    def __call__(self, length: int, width: int) -> Float[Array, "q s s"]:
        """Scores of every pair of positions in a row of `length` tokens."""
        shape = (self.num_buckets, self.num_heads)
        init = nn.initializers.normal(width**-0.5)
        table = self.param("embedding", init, shape, self.param_dtype)
        buckets = relative_buckets(length, self.num_buckets, self.max_distance)
        # A product with constants: the gradient of an indexed read is a slow scatter.
        one_hot = np.eye(self.num_buckets, dtype=np.float32)[buckets]
        return jnp.einsum(
            "nsr,rq->qns",
            one_hot,
            table.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )


class EncoderBlock(Layer):
    """Self-attention and a gated MLP, both residual with the norm before.

    Attributes: as in `TextEncoder`.
    """

    num_heads: int
    head_dim: int
    ffn_width: int
    num_buckets: int
    max_distance: int
    shared_bias: bool
    eps: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s d"],
        visible: Bool[Array, "b s s"],
        bias: Float[Array, "q s s"] | None,
    ) -> Float[Array, "b s d"]:
        """Updates the states; `bias` is None where every block has its own table."""
        if not self.shared_bias:
            bias = _relative_bias(self)(*x.shape[1:])
        y = RMSNorm(self.eps, name="attention_norm", **self.types)(x)
        x = x + self._attention(y, visible, bias)
        y = RMSNorm(self.eps, name="mlp_norm", **self.types)(x)
        width = x.shape[-1]
        gate = nn.gelu(self._linear("gate", self.ffn_width, width)(y))
        y = gate * self._linear("fc_in", self.ffn_width, width)(y)
        x = x + self._linear("fc_out", width, self.ffn_width)(y)
        return constrain(x, "batch", "text", None)

    def _attention(self, x: Array, visible: Array, bias: Array) -> Array:
        """Attention whose scores are not divided by anything, as T5 has it."""
        width, inner = x.shape[-1], self.num_heads * self.head_dim
        # The missing division is in the queries' initial size instead.
        q = self._linear("query", inner, width * self.head_dim)(x)
        k = self._linear("key", inner, width)(x)
        v = self._linear("value", inner, width)(x)
        q, k, v = (
            rearrange(y, "b s (q k) -> b s q k", q=self.num_heads) for y in (q, k, v)
        )
        scores = jnp.einsum("bnqk,bsqk->bqns", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None], scores + bias[None], -1e30)
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("bqns,bsqk->bnqk", weights, v)
        out = rearrange(out, "b s q k -> b s (q k)")
        return self._linear("out", width, inner)(out)

    def _linear(self, name: str, features: int, fan_in: int) -> Dense:
        init = nn.initializers.normal(fan_in**-0.5)
        return Dense(features, False, init, name=name, **self.types)


def _relative_bias(module: "EncoderBlock | TextEncoder") -> RelativeBias:
    fields = module.fields_of(RelativeBias)
    return RelativeBias(name="relative_bias", **fields)


class _ScanBlock(EncoderBlock):
    """A block as the body of `nn.scan`: its carry is the states."""

    @nn.compact
    def __call__(self, x, *context):
        return super().__call__(x, *context), None


class TextEncoder(Layer):
    """Encodes token ids of captions to one state each.

    Positions enter only as differences, so several captions may share a row.

    Attributes:
        vocab_size: number of token ids.
        width: channels of a state.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head.
        ffn_width: hidden channels of the gated MLP.
        num_buckets: buckets of relative position.
        max_distance: offset in tokens from which all share a bucket.
        shared_bias: one table of relative positions for all blocks (T5), rather than
            one in each (UMT5).
        eps: of every norm.
        dtype: type of the computation; norms and softmax stay float32.
        scan_layers: stack the parameters of the blocks and loop over them.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    head_dim: int
    ffn_width: int
    num_buckets: int = 32
    max_distance: int = 128
    shared_bias: bool = True
    eps: float = 1e-6
    scan_layers: bool = False

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], segment: Int[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """Encodes packed captions.

        Args:
            ids: token ids.
            segment: which caption of its row a token belongs to; 0 is padding.

        Returns:
            States of type `dtype`; zeros at padding.
        """
        x = nn.Embed(
            self.vocab_size,
            self.width,
            embedding_init=nn.initializers.normal(1.0),
            name="token_embed",
            **self.types,
        )(ids)
        x = constrain(x, "batch", "text", None)
        bias = _relative_bias(self)(*x.shape[1:]) if self.shared_bias else None
        x = self._blocks(x, Visible.packed(segment).mask(), bias)
        x = RMSNorm(self.eps, name="final_norm", **self.types)(x)
        return x * (segment > 0)[..., None].astype(x.dtype)

    def _blocks(self, x: Array, *context) -> Array:
        fields = self.fields_of(EncoderBlock)
        if self.scan_layers:
            stack = scanned(_ScanBlock, self.depth, nn.broadcast)
            return stack(name="blocks", **fields)(x, *context)[0]
        for i in range(self.depth):
            x = EncoderBlock(name=f"block_{i}", **fields)(x, *context)
        return x
