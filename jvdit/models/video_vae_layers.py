"""Layers of the video autoencoder: causal, and able to continue from a cache.

Each layer that looks back in time keeps the frames it will want again in the
collection "cache". Where that collection is mutable, a call continues where the cache
it was given ends, and without a cache it begins a new video; where it is not, every
call is a whole video. Whole and chunked are therefore the same layers and the same
arithmetic.

The architecture is that of the Wan 2.1 and 2.2 VAEs (Wan team 2025, arXiv:2503.20314,
section 4.1).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution, copies, inflated, recall
from jvdit.models.dense import Layer
from jvdit.models.layers import RMSNorm
from jvdit.sharding import constrain, frame_axes, frames_divided

# Largest number of attention scores held at once; more frames than fit go in turns.
SCORES_AT_ONCE = 2**26
# The same for the activations that go into or come out of a decoder's stage.
ACTIVATIONS_AT_ONCE = 2**27


class ChannelNorm(RMSNorm):
    """Divides each position by the root mean square of its channels, and scales."""

    def squared(self, x: Array) -> Array:
        """The square, with a gradient in another form than that of a product."""
        return jnp.square(x)


class ResBlock(Layer):
    """Two normalised causal convolutions beside a (projected) identity.

    A new block changes nothing: the last kernel starts at zero (arXiv:1901.09321).
    """

    features: int
    taps: int = 3
    eps: float = 1e-12

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w d"]:
        """Transforms frames; the size stays, the channels become `features`."""
        shortcut = x
        if x.shape[-1] != self.features:
            shape = self.features, (1, 1, 1)
            shortcut = Convolution(*shape, **self.types, name="shortcut")(x)
        for i, init in enumerate((inflated, nn.initializers.zeros), start=1):
            x = nn.silu(ChannelNorm(self.eps, **self.types, name=f"norm_{i}")(x))
            new = {"kernel_init": init, "name": f"conv_{i}", **self.types}
            x = Convolution(self.features, (self.taps, 3, 3), **new)(x)
        return x + shortcut


class FrameAttention(Layer):
    """Self-attention with one head among the positions of each frame."""

    eps: float = 1e-12

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Adds to each position what it attends to in its own frame."""
        batch, _, height, width, channels = x.shape
        y = ChannelNorm(self.eps, **self.types, name="norm")(x)
        y = Convolution(3 * channels, (1, 1), **self.types, name="qkv")(y)
        # Positions of the side that devices divide come first: so each has a stretch.
        order = "(w h)" if frame_axes(y)[3] else "(h w)"
        y = rearrange(y, f"b f h w c -> (b f) {order} c")
        y = constrain(y, None, "tokens", None)
        at_once = max(1, SCORES_AT_ONCE // y.shape[1] ** 2)
        if at_once < y.shape[0]:
            y = jax.lax.map(jax.checkpoint(_attend), y, batch_size=at_once)
        else:
            y = jax.vmap(_attend)(y)
        sizes = {"b": batch, "h": height, "w": width}
        y = rearrange(y, f"(b f) {order} c -> b f h w c", **sizes)
        return x + Convolution(channels, (1, 1), **self.types, name="proj")(y)


def _attend(qkv: Array) -> Array:
    query, key, value = jnp.split(qkv, 3, axis=-1)
    scores = jnp.einsum("nc,mc->nm", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("nm,mc->nc", weights.astype(value.dtype), value)


class Downsample(Layer):
    """With `spatial` halves height and width, with `temporal` the later frames."""

    spatial: bool
    temporal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j c"]:
        """Pads below and to the right only, so that an even size halves exactly."""
        channels = x.shape[-1]
        if self.spatial:
            shape = channels, (3, 3), (1, 2, 2), ((0, 1), (0, 1))
            x = Convolution(*shape, **self.types, name="conv")(x)
        if not self.temporal:
            return x
        past = recall(self, x, 1)
        new = {"kernel_init": copies, "name": "time_conv", **self.types}
        time_conv = Convolution(channels, (3, 1, 1), (2, 1, 1), **new)
        if past is not None:
            return time_conv(x, past)
        # The first frame stays as it is; it is also the first that a window sees.
        return jnp.concatenate([x[:, :1], time_conv(x, x[:, :0])], axis=1)


class Upsample(Layer):
    """With `spatial` doubles height and width, with `temporal` the later frames."""

    features: int
    spatial: bool
    temporal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Makes two frames of each one, but one of the first frame of a video."""
        if self.temporal:
            # The first frame stays as it is, and no window ever sees it.
            first = 0 if self.has_variable("cache", "frames") else 1
            later = x[:, first:]
            past = recall(self, later, 2)
            if past is None:
                past = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))
            new = {"kernel_init": copies, "name": "time_conv", **self.types}
            later = Convolution(2 * x.shape[-1], (3, 1, 1), **new)(later, past)
            later = rearrange(later, "b f h w (r c) -> b (f r) h w c", r=2)
            x = jnp.concatenate([x[:, :first], later], axis=1)
        new = {"upsample": self.spatial, "name": "conv", **self.types}
        return Convolution(self.features, (3, 3), **new)(x)


# Shortcuts around stages, without parameters, are what the Wan 2.2 autoencoder adds to
# that of Wan 2.1; the idea is that of DC-AE (arXiv:2410.10733).


def average_down(
    x: Float[Array, "b f h w c"], features: int, time: int, space: int
) -> Float[Array, "b g i j d"]:
    """Moves cells of time x space x space to the channels, and averages groups.

    Zeros before the first frame complete its cell.

    Raises:
        ValueError: the channels don't form equal groups.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    cell = {"u": time, "r": space, "q": space}
    x = rearrange(x, "b (f u) (h r) (w q) c -> b f h w (c u r q)", **cell)
    if features % x.shape[-1] == 0:
        return jnp.repeat(x, features // x.shape[-1], axis=-1)
    if x.shape[-1] % features:
        raise ValueError(
            f"a residual shortcut averages {x.shape[-1]} channels to {features}, which "
            "must divide them; choose multipliers that are powers of two."
        )
    return reduce(x, "b f h w (d g) -> b f h w d", "mean", d=features)


def duplicate_up(
    x: Float[Array, "b f h w c"], features: int, time: int, space: int
) -> Float[Array, "b g i j d"]:
    """Repeats channels, and moves them to cells of time x space x space.

    Raises:
        ValueError: the channels can't be repeated equally.
    """
    wanted = features * time * space**2
    if wanted % x.shape[-1]:
        raise ValueError(
            f"a residual shortcut repeats {x.shape[-1]} channels to {wanted}, which "
            "they must divide; choose multipliers that are powers of two."
        )
    x = jnp.repeat(x, wanted // x.shape[-1], axis=-1)
    cell = {"u": time, "r": space, "q": space}
    return rearrange(x, "b f h w (d u r q) -> b (f u) (h r) (w q) d", **cell)


class _Stage(Layer):
    """Residual blocks at one resolution.

    Attributes:
        features: channels.
        blocks: how many residual blocks.
        spatial: halve, or double, height and width behind them.
        temporal: halve, or double, the frames.
        residual: add to the result the input, averaged or repeated to its shape.
        block: makes a residual block.
    """

    features: int
    blocks: int
    spatial: bool
    temporal: bool
    residual: bool
    block: Callable[..., nn.Module]

    def _transformed(self, x: Array) -> Array:
        for i in range(self.blocks):
            x = self.block(self.features, name=f"res_{i}")(x)
        return x

    @property
    def _factors(self) -> tuple[int, int]:
        return 1 + self.temporal, 1 + self.spatial


class DownStage(_Stage):
    """Residual blocks at one resolution, then what is halved of it."""

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Codes the input at the next coarser resolution."""
        y = self._transformed(x)
        if self.spatial or self.temporal:
            y = Downsample(name="resample", **self.fields_of(Downsample))(y)
        if self.residual:
            y = y + average_down(x, self.features, *self._factors)
        return y


class UpStage(_Stage, kw_only=True):
    """Residual blocks at one resolution, then doubling: the inverse of a DownStage.

    Attributes:
        out_features: channels of the result, where anything is doubled.
    """

    out_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Decodes the input at the next finer resolution."""
        y = self._transformed(x)
        if not (self.spatial or self.temporal):
            return y
        fields = self.fields_of(Upsample) | {"features": self.out_features}
        y = Upsample(name="resample", **fields)(y)
        if self.residual:
            copies = duplicate_up(x, y.shape[-1], *self._factors)
            # At the start of a video the first frame is one frame, not two.
            y = y + copies[:, copies.shape[1] - y.shape[1] :]
        return y


def _save_products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in ("conv_general_dilated", "dot_general")


# Name -> what the backward pass finds saved; None: everything.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": _save_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Coder(Layer):
    """What an autoencoder and both of its halves have in common.

    Attributes: as in `VideoVAE`.
    """

    multipliers: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    spatial_downsample: Sequence[bool] | None = None
    temporal_downsample: Sequence[bool] = (False, True, True)
    stage_taps: Sequence[int] | None = None
    residual_shortcuts: bool = False
    middle_attention: bool = True
    norm_eps: float = 1e-12
    remat: str = "none"

    @property
    def spatial(self) -> Sequence[bool]:
        """Whether height and width are halved between each stage and the next."""
        always = (True,) * (len(self.multipliers) - 1)
        return always if self.spatial_downsample is None else self.spatial_downsample

    @property
    def taps(self) -> Sequence[int]:
        """Time taps of each stage's kernels."""
        return (
            (3,) * len(self.multipliers) if self.stage_taps is None else self.stage_taps
        )


class _Half(Coder, kw_only=True):
    """An encoder or a decoder.

    Attributes:
        width: channels of the finest stage.
        out_channels: channels of the result.
    """

    width: int
    out_channels: int

    @property
    def _widths(self) -> list[int]:
        return [self.width * multiplier for multiplier in self.multipliers]

    def _res_block(self, taps: int) -> Any:
        """A maker of residual blocks under the policy of rematerialisation."""
        policy = REMAT[self.remat]
        block = ResBlock if policy is None else nn.remat(ResBlock, policy=policy)
        return functools.partial(block, taps=taps, eps=self.norm_eps, **self.types)

    def _stage(self, i: int, halving: int, blocks: int) -> dict[str, Any]:
        """The fields of stage i, of which this halving, if there is one, is a part."""
        halves = 0 <= halving < len(self.spatial)
        return {
            "features": self._widths[i],
            "blocks": blocks,
            "spatial": halves and self.spatial[halving],
            "temporal": halves and self.temporal_downsample[halving],
            "residual": self.residual_shortcuts,
            "block": self._res_block(self.taps[i]),
            **self.types,
        }

    def _conv(self, name: str, features: int, taps: int, x: Array) -> Array:
        return Convolution(features, (taps, 3, 3), **self.types, name=name)(x)

    def _middle(self, x: Array) -> Array:
        """Two residual blocks at the coarsest resolution around attention."""
        block = self._res_block(self.taps[-1])
        x = block(x.shape[-1], name="mid_res_0")(x)
        if self.middle_attention:
            x = FrameAttention(self.norm_eps, **self.types, name="mid_attention")(x)
        return block(x.shape[-1], name="mid_res_1")(x)

    def _head(self, x: Array, taps: int) -> Array:
        x = nn.silu(ChannelNorm(self.norm_eps, **self.types, name="norm_out")(x))
        return self._conv("conv_out", self.out_channels, taps, x)


class Encoder(_Half):
    """Stages from fine to coarse, then the middle."""

    @nn.compact
    def __call__(self, x: Float[Array, "b F i j c"]) -> Float[Array, "b f h w d"]:
        """Codes patches of pixels as moments of latents."""
        x = self._conv("conv_in", self._widths[0], self.taps[0], x)
        for i in range(len(self.multipliers)):
            stage = self._stage(i, i, self.num_res_blocks)
            x = DownStage(name=f"down_{i}", **stage)(x)
        return self._head(self._middle(x), self.taps[-1])


class Decoder(_Half):
    """The middle, then stages from coarse to fine."""

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b F i j d"]:
        """Decodes latents to patches of pixels."""
        x = self._middle(self._conv("conv_in", self._widths[-1], self.taps[-1], x))
        for i in reversed(range(len(self.multipliers))):
            fields = self._stage(i, i - 1, self.num_res_blocks + 1)
            # Wan 2.1 narrows while it upsamples, 2.2 in the next stage.
            width = self._widths[i]
            width = width if self.residual_shortcuts else width // 2
            stage = UpStage(name=f"up_{i}", out_features=width, **fields)
            x = _in_turns(stage, x) if self._is_large(x, stage) else stage(x)
        return self._head(x, self.taps[0])

    def _is_large(self, x: Array, stage: UpStage) -> bool:
        """Whether a stage of a video that goes on is to take a frame at a time."""
        cells = (1 + stage.spatial) ** 2 * (1 + stage.temporal)
        largest = max(x.size, x[..., 0].size * cells * stage.out_features)
        goes_on = stage.name in self.variables.get("cache", {})
        # What one device looks back at is the end of another's frames: no turns there.
        in_order = x.shape[1] > 1 and not frames_divided()
        return goes_on and in_order and largest > ACTIVATIONS_AT_ONCE


def _in_turns(stage: UpStage, x: Array) -> Array:
    """Takes frame after frame through a stage, each from the cache of the last."""
    run = nn.scan(
        lambda stage, _, frame: (None, stage(frame)),
        variable_broadcast="params",
        variable_carry="cache",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    _, frames = run(stage, None, x[:, :, None])
    return rearrange(frames, "b f u h w c -> b (f u) h w c")
