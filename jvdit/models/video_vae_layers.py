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
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution, copies, inflated, recall
from jvdit.models.video_vae_shortcuts import average_down, duplicate_up
from jvdit.sharding import constrain, frame_axes, frames_divided

# Largest number of attention scores held at once; more frames than fit go in turns.
SCORES_AT_ONCE = 2**26
# The same for the activations that go into or come out of a decoder's stage.
ACTIVATIONS_AT_ONCE = 2**27


class ChannelNorm(nn.Module):
    """Divides each position by the root mean square of its channels, and scales."""

    eps: float = 1e-12
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Normalises in float32 and returns the type of `x`."""
        ones = nn.initializers.ones_init()
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(power + self.eps) * scale).astype(x.dtype)


class ResBlock(nn.Module):
    """Two normalised causal convolutions beside a (projected) identity.

    A new block changes nothing: the last kernel starts at zero (arXiv:1901.09321).
    """

    features: int
    taps: int = 3
    eps: float = 1e-12
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w d"]:
        """Transforms frames; the size stays, the channels become `features`."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shortcut = x
        if x.shape[-1] != self.features:
            project = Convolution(self.features, (1, 1, 1), **types, name="shortcut")
            shortcut = project(x)
        inits = (inflated, nn.initializers.zeros_init())
        for i, init in enumerate(inits, start=1):
            norm = ChannelNorm(self.eps, self.param_dtype, name=f"norm_{i}")
            kernel_size = (self.taps, 3, 3)
            conv = Convolution(
                self.features, kernel_size, kernel_init=init, **types, name=f"conv_{i}"
            )
            x = conv(nn.silu(norm(x)))
        return x + shortcut


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame."""

    eps: float = 1e-12
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """Adds to each position what it attends to in its own frame."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, _, height, width, channels = x.shape
        y = ChannelNorm(self.eps, self.param_dtype, name="norm")(x)
        y = Convolution(3 * channels, (1, 1), **types, name="qkv")(y)
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
        return x + Convolution(channels, (1, 1), **types, name="proj")(y)


def _attend(qkv: Array) -> Array:
    query, key, value = jnp.split(qkv, 3, axis=-1)
    scores = jnp.einsum("nc,mc->nm", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("nm,mc->nc", weights.astype(value.dtype), value)


class Downsample(nn.Module):
    """With `spatial` halves height and width, with `temporal` the later frames."""

    spatial: bool
    temporal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j c"]:
        """Pads below and to the right only, so that an even size halves exactly."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        right = ((0, 1), (0, 1))
        channels = x.shape[-1]
        if self.spatial:
            conv = Convolution(channels, (3, 3), (2, 2), right, **types, name="conv")
            x = conv(x)
        if not self.temporal:
            return x
        past = recall(self, x, 1)
        shape = {"kernel_size": (3, 1, 1), "strides": (2, 1, 1), "kernel_init": copies}
        time_conv = Convolution(channels, **shape, **types, name="time_conv")
        if past is not None:
            return time_conv(x, past)
        # The first frame stays as it is; it is also the first that a window sees.
        return jnp.concatenate([x[:, :1], time_conv(x, x[:, :0])], axis=1)


class Upsample(nn.Module):
    """With `spatial` doubles height and width, with `temporal` the later frames."""

    features: int
    spatial: bool
    temporal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Makes two frames of each one, but one of the first frame of a video."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.temporal:
            # The first frame stays as it is, and no window ever sees it.
            first = 0 if self.has_variable("cache", "frames") else 1
            later = x[:, first:]
            past = recall(self, later, 2)
            if past is None:
                past = jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:]))
            features, shape = 2 * x.shape[-1], {"kernel_size": (3, 1, 1)}
            time_conv = Convolution(
                features, **shape, kernel_init=copies, **types, name="time_conv"
            )
            later = time_conv(later, past)
            later = rearrange(later, "b f h w (r c) -> b (f r) h w c", r=2)
            x = jnp.concatenate([x[:, :first], later], axis=1)
        shape = {"kernel_size": (3, 3), "upsample": self.spatial}
        return Convolution(self.features, **shape, **types, name="conv")(x)


class DownStage(nn.Module):
    """Residual blocks at one resolution, then what is halved of it.

    Attributes:
        features: channels.
        blocks: how many residual blocks.
        taps: time taps of their kernels.
        spatial: halve height and width at the end.
        temporal: halve the frames at the end.
        residual: add to the result the input, averaged down to its shape.
        block: makes a residual block.
    """

    features: int
    blocks: int
    spatial: bool
    temporal: bool
    residual: bool
    block: Callable[..., nn.Module]
    types: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Codes the input at the next coarser resolution."""
        y = x
        for i in range(self.blocks):
            y = self.block(self.features, name=f"res_{i}")(y)
        if self.spatial or self.temporal:
            resample = Downsample(
                self.spatial, self.temporal, **self.types, name="resample"
            )
            y = resample(y)
        if self.residual:
            factors = (1 + self.temporal, 1 + self.spatial)
            y = y + average_down(x, self.features, *factors)
        return y


class UpStage(nn.Module):
    """Residual blocks at one resolution, then doubling: the inverse of a DownStage."""

    features: int
    out_features: int
    blocks: int
    spatial: bool
    temporal: bool
    residual: bool
    block: Callable[..., nn.Module]
    types: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g i j d"]:
        """Decodes the input at the next finer resolution."""
        y = x
        for i in range(self.blocks):
            y = self.block(self.features, name=f"res_{i}")(y)
        if not (self.spatial or self.temporal):
            return y
        y = Upsample(
            self.out_features,
            self.spatial,
            self.temporal,
            **self.types,
            name="resample",
        )(y)
        if self.residual:
            copies = duplicate_up(x, y.shape[-1], 1 + self.temporal, 1 + self.spatial)
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


class _Coder(nn.Module):
    """What both halves share: the fields of `VideoVAE`; widths are fine to coarse."""

    widths: Sequence[int]
    taps: Sequence[int]
    spatial: Sequence[bool]
    temporal: Sequence[bool]
    out_channels: int
    num_res_blocks: int
    residual: bool
    attention: bool
    eps: float
    remat: str
    dtype: Any
    param_dtype: Any

    @property
    def _types(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def _res_block(self, taps: int) -> Any:
        """A maker of residual blocks under the policy of rematerialisation."""
        policy = REMAT[self.remat]
        block = ResBlock if policy is None else nn.remat(ResBlock, policy=policy)
        return functools.partial(block, taps=taps, eps=self.eps, **self._types)

    def _conv(self, name: str, features: int, taps: int, x: Array) -> Array:
        return Convolution(features, (taps, 3, 3), **self._types, name=name)(x)

    def _middle(self, x: Array) -> Array:
        """Two residual blocks at the coarsest resolution around attention."""
        block = self._res_block(self.taps[-1])
        x = block(x.shape[-1], name="mid_res_0")(x)
        if self.attention:
            x = FrameAttention(self.eps, **self._types, name="mid_attention")(x)
        return block(x.shape[-1], name="mid_res_1")(x)

    def _head(self, x: Array, taps: int) -> Array:
        x = nn.silu(ChannelNorm(self.eps, self.param_dtype, name="norm_out")(x))
        return self._conv("conv_out", self.out_channels, taps, x)


class Encoder(_Coder):
    """Stages from fine to coarse, then the middle."""

    @nn.compact
    def __call__(self, x: Float[Array, "b F i j c"]) -> Float[Array, "b f h w d"]:
        """Codes patches of pixels as moments of latents."""
        x = self._conv("conv_in", self.widths[0], self.taps[0], x)
        for i, width in enumerate(self.widths):
            last = i == len(self.widths) - 1
            x = DownStage(
                width,
                self.num_res_blocks,
                spatial=not last and self.spatial[i],
                temporal=not last and self.temporal[i],
                residual=self.residual,
                block=self._res_block(self.taps[i]),
                types=self._types,
                name=f"down_{i}",
            )(x)
        return self._head(self._middle(x), self.taps[-1])


class Decoder(_Coder):
    """The middle, then stages from coarse to fine."""

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b F i j d"]:
        """Decodes latents to patches of pixels."""
        x = self._middle(self._conv("conv_in", self.widths[-1], self.taps[-1], x))
        for i, width in reversed(list(enumerate(self.widths))):
            fields = {
                "features": width,
                # Wan 2.1 narrows while it upsamples, 2.2 in the next stage.
                "out_features": width if self.residual else width // 2,
                "blocks": self.num_res_blocks + 1,
                "spatial": i > 0 and self.spatial[i - 1],
                "temporal": i > 0 and self.temporal[i - 1],
                "residual": self.residual,
                "block": self._res_block(self.taps[i]),
                "types": self._types,
                "name": f"up_{i}",
            }
            stage = UpStage(**fields)
            x = _in_turns(stage, x) if self._is_large(x, fields) else stage(x)
        return self._head(x, self.taps[0])

    def _is_large(self, x: Array, stage: dict[str, Any]) -> bool:
        """Whether a stage of a video that goes on is to take a frame at a time."""
        cells = (1 + stage["spatial"]) ** 2 * (1 + stage["temporal"])
        largest = max(x.size, x[..., 0].size * cells * stage["out_features"])
        goes_on = stage["name"] in self.variables.get("cache", {})
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
