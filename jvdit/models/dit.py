"""The diffusion transformer: packed noisy tokens to velocity.

Wan-shaped (arXiv:2503.20314): the released Wan 2.1 and 2.2 networks are rows of
`VARIANTS`, and our own models differ from them in fields only.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.attention.dispatch import rope_tables, wan_axes_dims
from jvdit.models.attention.past import Past
from jvdit.models.attention.patterns import Reach, rules, share
from jvdit.models.dense import Dense, Layer
from jvdit.models.dit_blocks import (
    Block,
    Context,
    ControlBlock,
    ImageEmbed,
    ScanBlock,
)
from jvdit.models.dit_checks import check_inputs
from jvdit.models.kinds import join, laid_out, side_by_side, split
from jvdit.models.layers import (
    Mlp,
    Modulation,
    fusion_boundary,
    modulate,
    rematerialise,
    reused,
    scanned,
    timestep_embedding,
)
from jvdit.shapes import Text, Tokens
from jvdit.sharding import constrain

_WAN_14B = {
    "width": 5120,
    "depth": 40,
    "num_heads": 40,
    "ffn_width": 13824,
    "in_channels": 64,
    "out_channels": 64,
    "text_width": 4096,
}

_WAN_1_3B = _WAN_14B | {"width": 1536, "depth": 30, "num_heads": 12, "ffn_width": 8960}
_FIRST_FRAME, _PICTURE = {"cond_channels": 80}, {"image_width": 1280}
_CONTROL = {"control_channels": 384}

# Sizes by name: `DiT(**VARIANTS[name])`. Channels count a whole patch: Wan's 16 latent
# channels in patches of 1 x 2 x 2 make 64. Rows without channels belong to our own
# models, where the autoencoder and the text encoder decide them.
VARIANTS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": _WAN_1_3B,
    "wan2.1-t2v-14b": _WAN_14B,
    "wan2.1-i2v-14b": _WAN_14B | _FIRST_FRAME | _PICTURE,
    "wan2.1-flf2v-14b": _WAN_14B | _FIRST_FRAME | _PICTURE | {"image_length": 514},
    "wan2.1-vace-1.3b": _WAN_1_3B | _CONTROL | {"control_layers": (*range(0, 30, 2),)},
    "wan2.1-vace-14b": _WAN_14B | _CONTROL | {"control_layers": (*range(0, 40, 5),)},
    "wan2.2-t2v-a14b": _WAN_14B,
    "wan2.2-i2v-a14b": _WAN_14B | _FIRST_FRAME,
    "wan2.2-ti2v-5b": _WAN_14B
    | {"width": 3072, "depth": 30, "num_heads": 24, "ffn_width": 14336}
    | {"in_channels": 192, "out_channels": 192},
    "world-s": {"width": 192, "depth": 6, "num_heads": 4, "ffn_width": 768},
    "world-m": {"width": 256, "depth": 8, "num_heads": 4, "ffn_width": 1024},
    "tiny": {"width": 32, "depth": 2, "num_heads": 2, "ffn_width": 64},
}

# Passes over the products with weights and of attention, by what is trained.
_PASSES = {"nothing": (1, 1), "adapters": (2, 3), "weights": (3, 3)}

_init = nn.initializers.normal(0.02)


class DiT(Layer):
    """Predicts the velocity of noisy latent tokens, given text.

    A new network predicts zero: the last layer starts at zero.

    Attributes:
        width: channels of a token inside the network.
        depth: number of blocks.
        num_heads: attention heads. On a TPU they should have a multiple of 128
            channels: others can't use flash attention there, which is warned of.
        ffn_width: hidden channels of the MLPs.
        in_channels: channels of an input token: a whole patch, ordered (pt ph pw c).
        out_channels: channels of an output token, in the same order.
        text_width: channels of the text states.
        freq_dim: sinusoids of the noise level.
        qk_norm: RMS-normalise queries and keys over all heads together.
        cross_norm: affine layer norm before the cross-attention.
        eps: of every norm.
        rope_dims: channels of a head that turn with (t, y, x). None: Wan's split.
        rope_theta: base of the rotary wavelengths.
        position_scale: multiplies the positions (t, y, x) before RoPE: with t in
            seconds, rotary units of time in each second.
        time_scale: multiplies the noise level, in [0, 1], before its sinusoids.
        cond_channels: channels of `tokens.cond`, embedded beside those of the input
            by a projection that starts at zero; 0: there are none.
        image_width: channels of the states of an image encoder, to which the tokens
            attend beside the text (Wan 2.1 I2V); 0: there are none.
        image_length: how many of them have a learned position; 0: none has.
        control_channels: channels of a patch of control signals, which blocks of their
            own turn into hints for others (VACE, arXiv:2503.07598); 0: there are none.
        control_layers: the blocks that get a hint, in order.
        sound_channels: channels of a token of sound, which has projections in and out,
            and modulation, of its own; 0: there is no sound.
        own_blocks: first blocks in whose self-attention sound has projections of its
            own; None: a third of them.
        patterns: names in `PATTERNS`, a cycle: layer i has `patterns[i % len]`; () is
            full attention in all of them, ("spatial", "temporal") alternates.
        chunk_frames: frames of a chunk of the pattern "chunk_causal".
        window_frames: frames before and after its own that a token sees in "windowed".
        skips: each block of the second half takes what left its counterpart in the
            first, the last block what left the first (arXiv:2209.12152, 2405.04233), by
            a projection that at first passes none of it on.
        dtype: type of the computation; norms, softmax and modulation stay float32.
        remat: what the backward pass recomputes: "none", "full" (whole blocks), "dots"
            (all but matrix products), "attention" (all but flash attention), or
            "offload" (the same, with what goes into each block in the host's memory).
        scan_layers: stack the parameters of the blocks on a leading axis and loop over
            it: compiles once for all blocks. Unrolled is faster on CPU.
        attention_implementation: form of `attention`.
    """

    width: int
    depth: int
    num_heads: int
    ffn_width: int
    in_channels: int
    out_channels: int
    text_width: int
    freq_dim: int = 256
    qk_norm: bool = True
    cross_norm: bool = True
    eps: float = 1e-6
    rope_dims: Sequence[int] | None = None
    rope_theta: float = 1e4
    position_scale: Sequence[float] = (1.0, 1.0, 1.0)
    time_scale: float = 1000.0
    cond_channels: int = 0
    image_width: int = 0
    image_length: int = 0
    control_channels: int = 0
    control_layers: Sequence[int] = ()
    sound_channels: int = 0
    own_blocks: int | None = None
    patterns: Sequence[str] = ()
    chunk_frames: int = 4
    window_frames: int = 1
    skips: bool = False
    remat: str = "none"
    scan_layers: bool = False
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        t: Float[Array, "b g"],
        text: Text,
        past: Past | None = None,
    ) -> Float[Array, "b n o"]:
        """Predicts the velocity dx/dt of every token.

        Args:
            tokens: noisy latents with their positions, levels and what they see.
            t: noise levels of each row: 0 is data, 1 is noise.
            text: text states, of which tokens attend to those that they see.
            past: the chunks before this one, of a causal network. Their keys and values
                are in the collection "cache", which takes those of these tokens in if
                it is mutable.

        Returns:
            Velocity in float32. Padding tokens have values without meaning.

        Raises:
            ValueError: a field or an argument doesn't fit the others.
        """
        check_inputs(self, tokens, t, text, past)
        x = self._embed(tokens)
        context = self._context(tokens, t, text, past)
        x = reused(self, x, lambda dit, x: dit._blocks(x, tokens, context))
        return self._head(x, context)

    def example_inputs(self) -> tuple[Tokens, Array, Text]:
        """The smallest inputs with which the network has all of its parameters."""

        def blank(length: int, channels: int) -> Array | None:
            return jnp.zeros((1, length, channels)) if channels else None

        n, kinds = (2, (1, 1)) if self.sound_channels else (1, ())
        tokens = Tokens(
            jnp.zeros((1, n, self.token_channels)),
            jnp.zeros((1, n, 3)),
            level=jnp.arange(n)[None] if kinds else None,
            cond=blank(n, self.cond_channels),
            control=blank(n, self.control_channels),
            kinds=kinds,
        )
        image = blank(self.image_length or 1, self.image_width)
        text = Text(jnp.zeros((1, 1, self.text_width)), image=image)
        return tokens, jnp.zeros((1, n)), text

    @property
    def token_channels(self) -> int:
        """Channels of a token of any kind; narrower ones end with zeros."""
        return max(self.in_channels, self.sound_channels)

    def _embed(self, tokens: Tokens) -> Float[Array, "b n d"]:
        """Projects patches, and what is known of them, to the width of the network."""
        init = nn.initializers.xavier_uniform()
        named = ("patch_embed", self.in_channels), ("sound_embed", self.sound_channels)
        parts = [
            Dense(self.width, kernel_init=init, name=name, **self.types)(
                part[..., :channels]
            )
            for (name, channels), part in zip(
                named, side_by_side(tokens.latents, tokens.kinds), strict=False
            )
        ]
        x = join(parts)
        if tokens.cond is not None:
            new = {"use_bias": False, "kernel_init": nn.initializers.zeros}
            known = Dense(self.width, name="cond_embed", **new, **self.types)
            x += known(laid_out(tokens.cond, tokens.kinds))
        return constrain(x, "batch", "tokens", None)

    def _context(
        self, tokens: Tokens, t: Array, text: Text, past: Past | None
    ) -> Context:
        """Embeds noise levels, positions, text and picture, once for all blocks."""
        width = self.width
        embed = Mlp(width, width, nn.gelu, _init, name="text_embed", **self.types)
        time, rows = self._time_embedding(t)
        kinds = tokens.kinds
        lay = partial(jax.tree.map, lambda x: laid_out(x, kinds))
        texts = text.seen_by(tokens)
        if texts is not None:
            texts = texts._replace(low=lay(texts.low), high=lay(texts.high))
        image = ImageEmbed(width, self.image_length, name="image_embed", **self.types)
        names, position = self.patterns or ("full",), lay(tokens.position)
        visible = lay(rules(tokens, names, self._reach))
        if past is not None:
            position = jnp.concatenate([past.position, position], axis=1)
            visible = dict.fromkeys(names, past.seen_with(tokens.latents.shape[1]))
        return Context(
            time=time,
            rows=rows,
            level=lay(tokens.level) if t.shape[1] > 1 else None,
            rotation=rope_tables(
                position, self.rotary_dims, self.rope_theta, self.position_scale
            ),
            visible=visible,
            text=embed(text.embeds),
            text_visible=texts,
            image=None if text.image is None else image(text.image),
            past=past,
            kinds=kinds,
            frames=tokens.frames,
        )

    def _head(self, x: Array, context: Context) -> Float[Array, "b n o"]:
        """Projects tokens to their velocity."""
        types = {"param_dtype": self.param_dtype}
        modulation = Modulation(2, name="head_modulation", **types)
        kinds = context.kinds
        levels = context.time[:, :, None], context.level
        shift, scale = modulation(*levels, len(kinds) or 1)
        x = modulate(x, shift, scale, self.eps)
        named = ("head", self.out_channels), ("sound_head", self.sound_channels)
        parts = []
        for (name, channels), part in zip(named, split(x, kinds), strict=False):
            fields = {"kernel_init": nn.initializers.zeros, "name": name}
            part = Dense(channels, **fields, **self.types)(part)
            # As wide as what came in, which sound may be the widest of.
            spare = max(self.out_channels, self.sound_channels) - channels
            parts.append(jnp.pad(part, ((0, 0), (0, 0), (0, spare))) if spare else part)
        x = jnp.concatenate(parts, axis=1).astype(jnp.float32)
        return constrain(x, "batch", "tokens", None)

    def _time_embedding(self, t: Array) -> tuple[Array, Array]:
        """Embeds the noise levels: one vector each, and six rows for the blocks."""
        types = {"param_dtype": self.param_dtype}
        x = timestep_embedding(t * self.time_scale, self.freq_dim)
        x = Mlp(self.width, self.width, nn.silu, _init, name="time_embed", **types)(x)
        init = nn.initializers.xavier_uniform()
        rows = Dense(6 * self.width, kernel_init=init, name="time_proj", **types)
        return x, rearrange(rows(nn.silu(x)), "b g (r d) -> b g r d", r=6)

    def _hints(self, x: Array, tokens: Tokens, context: Context) -> Array | None:
        """What the control blocks say to each of `control_layers`, stacked."""
        if tokens.control is None:
            return None
        control = laid_out(tokens.control, tokens.kinds)
        y = Dense(self.width, name="control_embed", **self.types)(control)
        y = Dense(self.width, name="control_in", **self.types)(y) + x
        block, fields = rematerialise(ControlBlock, self.remat), self.fields_of(Block)
        count, hints = len(self.control_layers), []
        if self.scan_layers:
            stack = scanned(block, count, (0, nn.broadcast))(name="controls", **fields)
            return stack(y, self._numbers(self.control_layers), context)[1]
        for i, layer in enumerate(self.control_layers):
            fields["patterns"] = self._pattern(layer)
            y, hint = block(name=f"control_{i}", **fields)(y, None, context)
            hints.append(hint)
        return jnp.stack(hints)

    def _blocks(self, x: Array, tokens: Tokens, context: Context) -> Array:
        hints, fields = self._hints(x, tokens, context), self.fields_of(Block)
        layers = list(self.control_layers)
        slots = [layers.index(i) if i in layers else -1 for i in range(self.depth)]
        if self.scan_layers:
            return self._stacks(x, slots, hints, context)
        block, left = rematerialise(Block, self.remat), []
        for i, slot in enumerate(slots):
            fields |= {"own": i < self._own, "patterns": self._pattern(i)}
            layer = block(name=f"block_{i}", **fields)
            skip = left[self.depth - 1 - i] if i >= self._skipping else None
            x = fusion_boundary(layer(x, context, skip))
            if hints is not None and slot >= 0:
                x = x + hints[slot]
            left.append(x)
        return x

    def _stacks(
        self, x: Array, slots: Sequence[int], hints: Array | None, context: Context
    ) -> Array:
        """The blocks in stacks, which end where blocks begin to be others."""
        block, fields = rematerialise(ScanBlock, self.remat), self.fields_of(Block)
        depth, left = self.depth, []
        starts = sorted({0, self._own, self._skipping} - {depth})
        for start, end in itertools.pairwise([*starts, depth]):
            skip = None
            if start >= self._skipping:
                skip = jnp.concatenate(left)[depth - end : depth - start][::-1]
            fields |= {"own": start < self._own, "kept": end <= self._skipping < depth}
            name = f"blocks_{start}" if start else "blocks"
            axes = (0, 0, 0, nn.broadcast, nn.broadcast)
            stack = scanned(block, end - start, axes)(name=name, **fields)
            here = jnp.array(slots[start:end]), skip, self._numbers(range(start, end))
            x, kept = stack(x, *here, hints, context)
            if kept is not None:
                left.append(kept)
        return x

    @property
    def is_causal(self) -> bool:
        """Whether no chunk of a clip sees a later one, so that clips can stream."""
        return set(self.patterns) == {"chunk_causal"}

    @property
    def _skipping(self) -> int:
        """The first block that takes what left an earlier one."""
        return (self.depth + 1) // 2 if self.skips else self.depth

    @property
    def _reach(self) -> Reach:
        return Reach(self.chunk_frames, self.window_frames)

    def _pattern(self, layer: int) -> tuple[str, ...]:
        """The pattern of a layer, alone; (): that of all is full attention."""
        patterns = tuple(self.patterns)
        return patterns and (patterns[layer % len(patterns)],)

    def _numbers(self, layers: Sequence[int]) -> Array | None:
        """Numbers of layers, which choose their patterns where there are several."""
        return jnp.array(layers) if len(self.patterns) > 1 else None

    @property
    def _own(self) -> int:
        """How many blocks have projections of their own for sound."""
        if not self.sound_channels:
            return 0
        return self.depth // 3 if self.own_blocks is None else self.own_blocks

    @property
    def rotary_dims(self) -> tuple[int, ...]:
        """Channels of a head that turn with (t, y, x)."""
        if self.rope_dims is None:
            return wan_axes_dims(self.width // self.num_heads)
        return tuple(self.rope_dims)

    def flops(
        self, tokens: int, text: int, trained: str = "nothing", frames: int = 0
    ) -> int:
        """Floating-point operations that a row takes, for its share of a chip's peak.

        Counts two for each multiply-add of every matrix product, attention over all
        pairs of the row included, or over those that a pattern shows in a row of one
        clip; what is computed again doesn't count.

        Args:
            tokens: latent tokens of the row.
            text: text states of the row.
            trained: "nothing", one forward pass; "weights", a step of training: each
                product has a gradient of either factor, three passes; "adapters":
                frozen weights have none, two passes, but the factors of attention
                have both. The small products of the adapters don't count.
            frames: of a clip, in tokens, by which `patterns` see.

        Raises:
            ValueError: there are patterns, and `frames` isn't known.
        """
        weights, attention = _PASSES[trained]
        d, ffn = self.width, self.ffn_width
        each_token = 6 * d * d + 2 * d * ffn
        each_text = 2 * d * d
        ends = self.in_channels + self.cond_channels + self.out_channels
        ends *= tokens * d
        ends += text * (self.text_width * d + d * d)
        ends += self.freq_dim * d + 7 * d * d
        block = tokens * each_token + text * each_text
        ends += (self.depth - self._skipping) * tokens * 2 * d * d
        shares = [self._share(i, tokens, frames) for i in range(self.depth)]
        pairs = tokens * (round(sum(shares) * tokens) + self.depth * text)
        products = weights * (self.depth * block + ends) + attention * 2 * pairs * d
        return 2 * products

    def _share(self, layer: int, tokens: int, frames: int) -> float:
        """The share of the pairs of tokens that see each other in a layer."""
        (name,) = self._pattern(layer) or ("full",)
        if name != "full" and frames < 1:
            raise ValueError(
                f"`patterns` (={tuple(self.patterns)}) see by frames, and `frames` "
                f"(={frames}) of a clip must be at least 1."
            )
        return share(name, frames, max(tokens // max(frames, 1), 1), self._reach)
