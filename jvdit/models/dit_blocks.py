"""Blocks of the DiT: attention, modulated blocks, control blocks, image embedding."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jvdit.models.attention.dispatch import attention, rotate
from jvdit.models.attention.past import Past
from jvdit.models.dense import Dense, Layer
from jvdit.models.kinds import SUFFIXES, join, split
from jvdit.models.layers import (
    BLOCK_INPUT,
    LayerNorm,
    Mlp,
    Modulation,
    RMSNorm,
    modulate,
)
from jvdit.shapes import Visible
from jvdit.sharding import constrain

# Tables of `rope_tables`.
Rotation = tuple[Float[Array, "b _ k"], Float[Array, "b _ k"]]
Attend = Callable[..., Array]
# The name under which compiled programs choose between the patterns of a cycle.
CHOICE = "pattern_of_layer"


@flax.struct.dataclass
class Context:
    """What every block is told beside the tokens that it updates.

    Attributes:
        time: embedding of each noise level, in float32.
        rows: shifts, scales and gates of each noise level, in float32.
        level: which noise level each token is at. None: there is one.
        rotation: tables of `rope_tables` for the tokens, after those of `past`.
        visible: which tokens each token sees, by the names of patterns; None: all.
        text: states of the text, as wide as a token.
        text_visible: which of them each token sees; None: all.
        image: states of a picture, as wide as a token, or None.
        kinds: how many tokens are of each kind, see `models.kinds`; (): there is one.
        past: the tokens before them, of which blocks keep keys and values, or None.
        frames: of every row, see `Tokens`; 0: rows are no grids.
    """

    time: Float[Array, "b g d"]
    rows: Float[Array, "b g 6 d"]
    level: Int[Array, "b n"] | None
    rotation: Rotation
    visible: dict[str, Visible | None]
    text: Float[Array, "b s d"]
    text_visible: Visible | None
    image: Float[Array, "b i d"] | None
    past: Past | None = None
    kinds: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    frames: int = flax.struct.field(pytree_node=False, default=0)

    def attend(self, patterns: Sequence[str], layer: Int[Array, ""] | None) -> Attend:
        """Self-attention by the pattern of a layer.

        Args:
            patterns: a cycle of them, or that of the layer alone.
            layer: its number, where there are several.
        """
        forms = [
            partial(
                attention,
                visible=self.visible[x],
                # With the past before them, tokens see nearly all.
                pattern=x if self.past is None else "full",
                frames=self.frames,
            )
            for x in patterns or ("full",)
        ]
        if layer is None:
            (form,) = forms
            return form

        def chosen(*inputs: Array, **how: Any) -> Array:
            ways = [partial(form, **how) for form in forms]
            with jax.named_scope(CHOICE):
                return jax.lax.switch(layer % len(ways), ways, *inputs)

        return chosen


class Attention(Layer):
    """Multi-head attention with RMS-normalised queries and keys.

    Attributes:
        num_heads: heads; they divide the channels of the input.
        qk_norm: normalise queries and keys over all heads together.
        implementation: form of `attention`.
        keys: how a mesh divides the keys, see `attention`.
    """

    num_heads: int
    qk_norm: bool = True
    eps: float = 1e-6
    implementation: str = "auto"
    keys: str = "tokens"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b s d"],
        visible: Visible | None = None,
        rotation: Rotation | None = None,
        image: Float[Array, "b i d"] | None = None,
        kinds: tuple[int, ...] = (),
        attend: Attend | None = None,
        past: Past | None = None,
    ) -> Float[Array, "b n d"]:
        """Lets the tokens of `x` attend to those of `context`.

        Args:
            x: tokens that queries are made of.
            context: tokens that keys and values are made of; `x` in self-attention.
            visible: which tokens of `context` each of `x` sees; None: all.
            rotation: tables of `rope_tables` for queries and keys, or None.
            image: states of a picture, which have keys and values of their own and a
                softmax of their own; every token sees them. None: there are none.
            kinds: how many tokens are of each kind, if each has projections of its own;
                (): all have the same.
            attend: `attention` that knows what is visible; None: `visible` says it.
            past: the tokens before these, whose keys and values the collection "cache"
                holds, and takes these into if it is mutable. None: there are none.
        """

        def linear(
            name: str, y: Array, norm: str = "", kinds: tuple[int, ...] = kinds
        ) -> Array:
            made = []
            kernel_init = nn.initializers.xavier_uniform()
            for suffix, part in zip(SUFFIXES, split(y, kinds), strict=False):
                fields = {"kernel_init": kernel_init, "name": name + suffix}
                part = Dense(x.shape[-1], **fields, **self.types)(part)
                if norm:
                    part = RMSNorm(self.eps, name=norm + suffix, **self.types)(part)
                made.append(part)
            return join(made)

        def heads(y: Array) -> Array:
            return rearrange(y, "b n (q k) -> b n q k", q=self.num_heads)

        norms = ("query_norm", "key_norm") if self.qk_norm else ("", "")
        q, k = linear("query", x, norms[0]), linear("key", context, norms[1])
        q, k, v = heads(q), heads(k), heads(linear("value", context))
        if past is not None:
            k, v = self._after("keys", k, past), self._after("values", v, past)
        if rotation is not None:
            q = rotate(q, *(table[:, -q.shape[1] :] for table in rotation))
            k = rotate(k, *rotation)
        form = {"implementation": self.implementation}
        attend = attend or partial(attention, visible=visible)
        out = attend(q, k, v, keys=self.keys, **form)
        if image is not None:
            k = heads(linear("image_key", image, "image_key_norm", ()))
            v = heads(linear("image_value", image, kinds=()))
            out = out + attention(q, k, v, keys="text", **form)
        return linear("out", rearrange(out, "b n q k -> b n (q k)"))

    def _after(self, name: str, new: Array, past: Past) -> Array:
        """Keys or values after those that are kept; also keeps them, if it may."""
        shape = (len(new), past.position.shape[1], *new.shape[2:])
        kept = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        joined = jnp.concatenate([kept.value, new], axis=1)
        if self.is_mutable_collection("cache"):
            kept.value = past.moved(kept.value, new)
        return joined


class Block(Layer):
    """Self-attention, cross-attention to the text, and an MLP, each a residual.

    Attributes: as in `DiT`, and
        own: whether each kind of tokens has projections of its own in self-attention.
        patterns: the pattern of its self-attention, or those of several layers.
    """

    num_heads: int
    ffn_width: int
    qk_norm: bool = True
    cross_norm: bool = True
    eps: float = 1e-6
    attention_implementation: str = "auto"
    own: bool = False
    patterns: Sequence[str] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Context,
        skip: Float[Array, "b n d"] | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> Float[Array, "b n d"]:
        """Updates the tokens; norms, modulation and residual sums are float32.

        Args:
            x: the tokens.
            context: what else there is.
            skip: what an earlier block made of them, which joins in first.
            layer: the number of this block, which chooses from `patterns`. None: there
                is one pattern.
        """
        kinds = self.types
        if skip is not None:
            x = jnp.concatenate([x, skip], axis=-1)
            x = Dense(skip.shape[-1], kernel_init=_first, name="skip", **kinds)(x)
        x = checkpoint_name(x, BLOCK_INPUT)
        heads = (self.num_heads, self.qk_norm, self.eps, self.attention_implementation)
        modulation = Modulation(6, param_dtype=self.param_dtype, name="modulation")
        rows = modulation(context.rows, context.level, len(context.kinds) or 1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows

        y = modulate(x, shift, scale, self.eps).astype(self.dtype)
        y = Attention(*heads, name="self_attention", **kinds)(
            y,
            y,
            rotation=context.rotation,
            kinds=context.kinds if self.own else (),
            attend=context.attend(self.patterns, layer),
            past=context.past,
        )
        x = (x + y * gate).astype(self.dtype)

        norm = LayerNorm(self.eps, dtype=self.dtype, name="cross_norm")
        y = norm(x) if self.cross_norm else x
        y = Attention(*heads, keys="text", name="cross_attention", **kinds)(
            y, context.text, context.text_visible, image=context.image
        )
        x = x + y

        y = modulate(x, mlp_shift, mlp_scale, self.eps).astype(self.dtype)
        y = Mlp(self.ffn_width, x.shape[-1], name="mlp", **kinds)(y)
        x = (x + y * mlp_gate).astype(self.dtype)
        return constrain(x, "batch", "tokens", None)


class ScanBlock(Block):
    """A block as the body of `nn.scan`: its carry is the tokens.

    Attributes: as of `Block`, and
        kept: whether the tokens that leave each block are kept, for later ones.
    """

    kept: bool = False

    @nn.compact
    def __call__(self, x, slot, skip, layer, hints, context):
        """Updates the tokens, and adds the hint in `slot`; -1: none."""
        x = super().__call__(x, context, skip, layer)
        if hints is not None:
            hint = jax.lax.dynamic_index_in_dim(hints, slot, keepdims=False)
            x = x + jnp.where(slot >= 0, hint, 0)
        return x, x if self.kept else None


def _first(key: Any, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """A kernel that passes on the first half of its input."""
    return jnp.eye(*shape, dtype=dtype)


class ControlBlock(Block):
    """A block beside the others, whose tokens carry a control signal (VACE).

    It is the body of `nn.scan` too; `hint` is what it says to a block of the others.
    """

    @nn.compact
    def __call__(self, x, layer, context):
        """Updates the control tokens; returns (tokens, hint)."""
        x = super().__call__(x, context, layer=layer)
        zeros = nn.initializers.zeros
        return x, Dense(x.shape[-1], kernel_init=zeros, name="hint", **self.types)(x)


class ImageEmbed(Layer):
    """States of an image encoder to the width of the tokens (Wan 2.1 I2V).

    Attributes:
        width: channels of a token.
        length: states that have a learned position each; 0: none has.
    """

    width: int
    length: int = 0

    @nn.compact
    def __call__(self, states: Float[Array, "b i e"]) -> Float[Array, "b i d"]:
        """Norm, MLP with the exact GELU, norm."""
        width = states.shape[-1]
        x = states.astype(jnp.float32)
        if self.length:
            position = self.constant("table", 0, self.length, width)
            x = x + position.astype(jnp.float32)[None]
        x = LayerNorm(1e-5, name="norm_in", **self.types)(x)
        gelu = partial(nn.gelu, approximate=False)
        x = Mlp(width, self.width, gelu, name="mlp", **self.types)(x)
        return LayerNorm(1e-5, name="norm_out", **self.types)(x)
