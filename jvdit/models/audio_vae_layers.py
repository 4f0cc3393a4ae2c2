"""Layers of the audio autoencoder: convolutions over waveforms, and snake units.

Kernels are normalised and have a gain of their own (weight normalisation,
arXiv:1602.07868), as in released audio autoencoders.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.dense import Layer, along_last, product
from jvdit.sharding import constrain

_WAVE = ("NWC", "WIO", "NWC")
_TAPS = 7  # of the kernels that mix neighbouring samples
# Pi in parts, whose multiples up to 2^13 are exact but for the last's.
_PI = (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7)
_TERMS = 7  # of a sine's series: enough for float32, and for its derivative


def sine_squared(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The square of the sine, to 3e-7 for angles up to 2e4.

    XLA's sine makes sure of angles of any size, which takes a CPU 20 times as long and
    is most of the time of the whole autoencoder.
    """
    turns = jnp.round(x / math.pi)
    for part in _PI:
        x = x - turns * part
    square = x * x
    series = jnp.zeros_like(x)
    for k in reversed(range(_TERMS)):
        series = series * square + (-1) ** k / math.factorial(2 * k + 1)
    return square * series * series


class Snake(Layer):
    """The activation `x + sin(a x)^2 / a`, with `a` learned (arXiv:2006.08195, Eq. 3).

    It lets a network continue a tone.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Activates each channel with its own frequency."""
        alpha = self.constant("alpha", 1, x.shape[-1]).astype(jnp.float32)
        alpha = along_last(alpha, x)
        wide = x.astype(jnp.float32)
        wave = sine_squared(alpha * wide)
        return (wide + wave / (alpha + 1e-9)).astype(self.dtype)


class _Normalised(Layer):
    """A layer with a kernel of which each slice has a learned length.

    Attributes:
        features: channels of the result.
        start: what the kernel of a new layer is multiplied by.
    """

    features: int
    start: float = 1.0

    def _kernel(self, shape: Sequence[int], own: int) -> Array:
        """The kernel; slices along axis `own` have each their length."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        others = tuple(axis for axis in range(len(shape)) if axis != own)
        square = jnp.square(kernel.astype(jnp.float32)).sum(others, keepdims=True)
        length = jnp.sqrt(square)
        first = self.start * length.reshape(-1).astype(self.param_dtype)
        gain = self.param("gain", lambda _: first)
        gain = gain.reshape(length.shape).astype(jnp.float32)
        return (kernel * (gain / length)).astype(self.dtype)

    def _bias(self) -> Array:
        bias = self.constant("bias", 0, self.features).astype(self.dtype)
        return bias.reshape(1, 1, -1)


class WaveConv(_Normalised):
    """A convolution along time that keeps the length; zeros lie before and after.

    Attributes:
        taps: samples that the kernel spans, an odd number.
        dilation: samples from one tap to the next.
    """

    taps: int = _TAPS
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n d"]:
        """Mixes each sample with its neighbours."""
        kernel = self._kernel((self.taps, x.shape[-1], self.features), 2)
        around = (self.taps - 1) // 2 * self.dilation
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (1,),
            [(around, around)],
            rhs_dilation=(self.dilation,),
            dimension_numbers=_WAVE,
        )
        return y + self._bias()


class WaveDown(_Normalised, kw_only=True):
    """A convolution whose windows of `2 * stride` samples lie `stride` apart.

    Attributes:
        stride: samples for each sample of the result.
    """

    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b m d"]:
        """Makes n samples n / stride."""
        before = -(-self.stride // 2)
        kernel = self._kernel((2 * self.stride, x.shape[-1], self.features), 2)
        x = jnp.pad(x, ((0, 0), (before, self.stride - before), (0, 0)))
        # Two neighbouring blocks make a window: a product, and no strided windows.
        x = rearrange(x.astype(self.dtype), "b (m s) c -> b m (s c)", s=self.stride)
        x = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1)
        y = product(x, kernel.reshape(-1, self.features))
        return y + self._bias()


class WaveUp(_Normalised, kw_only=True):
    """The transposed `WaveDown`: windows of `2 * stride` samples are added up.

    Attributes:
        stride: samples of the result for each sample.
    """

    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b m c"]) -> Float[Array, "b n d"]:
        """Makes m samples m * stride."""
        # The length belongs to an input channel, as releases have it.
        kernel = self._kernel((x.shape[-1], 2 * self.stride, self.features), 0)
        windows = product(x.astype(self.dtype), kernel.reshape(x.shape[-1], -1))
        first, second = jnp.split(windows, 2, axis=-1)
        edge = ((0, 0), (0, 1), (0, 0)), ((0, 0), (1, 0), (0, 0))
        y = jnp.pad(first, edge[0]) + jnp.pad(second, edge[1])
        y = rearrange(y, "b m (s d) -> b (m s) d", s=self.stride)
        start = -(-self.stride // 2)
        return y[:, start : start + x.shape[1] * self.stride] + self._bias()


class Units(Layer):
    """Residual units, of which each looks further around than the one before.

    New ones change nothing.

    Attributes:
        dilations: of each unit.
    """

    dilations: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Adds to each sample what its neighbours say."""
        width = x.shape[-1]
        x = constrain(x, "batch", None, None)
        for i, dilation in enumerate(self.dilations):
            types: dict[str, Any] = self.types
            y = Snake(name=f"snake_{i}_in", **types)(x)
            y = WaveConv(width, dilation=dilation, name=f"conv_{i}_in", **types)(y)
            y = Snake(name=f"snake_{i}_out", **types)(y)
            add = WaveConv(width, taps=1, start=0.0, name=f"conv_{i}_out", **types)
            x = x + add(y)
        return x
