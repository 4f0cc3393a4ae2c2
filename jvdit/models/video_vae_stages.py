"""The two halves of the video autoencoder, stage after stage of one resolution."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution
from jvdit.models.dense import Layer
from jvdit.models.video_vae_layers import (
    ChannelNorm,
    Downsample,
    FrameAttention,
    ResBlock,
    Upsample,
    average_down,
    duplicate_up,
)
from jvdit.sharding import frames_divided

# Largest number of activations that go into or come out of a decoder's stage at once;
# where there are more, it takes a frame at a time.
ACTIVATIONS_AT_ONCE = 2**27


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
