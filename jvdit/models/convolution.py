"""Convolutions over video, causal in time, in the best form for each backend.

XLA's three-dimensional convolution is fast on TPU but slow on CPU and GPU, where the
same sum is better taken as one two-dimensional convolution over frames whose channels
are the time taps laid side by side (on an H200 in 0.75 of the time: Wan's decoder in
bfloat16, gradients of the world's in float32). `causal_conv3d` hides the choice.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.dense import Layer
from jvdit.sharding import FRAMES, constrain, frame_axes, frames_divided, platform

IMPLEMENTATIONS = ("auto", "taps", "native")
Padding = Sequence[tuple[int, int]]


def choose_implementation(implementation: str = "auto") -> str:
    """Resolves "auto" to the form that suits the backend.

    Raises:
        ValueError: the name isn't one of `IMPLEMENTATIONS`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"`implementation` (={implementation!r}) must be one of {IMPLEMENTATIONS}."
        )
    if implementation != "auto":
        return implementation
    return "native" if platform() == "tpu" else "taps"


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c d"],
    bias: Float[Array, " d"] | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding | None = None,
) -> Float[Array, "b i j d"]:
    """Two-dimensional convolution, channels last.

    Args:
        x: images.
        kernel: weights; a 1 x 1 kernel becomes a matrix product.
        bias: added to every position.
        strides: steps along height and width.
        padding: zeros before and after height and width. Default: those that keep
            the size at stride 1.
    """
    if kernel.shape[:2] == (1, 1) and tuple(strides) == (1, 1) and not padding:
        y = jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0])
    else:
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            tuple(strides),
            tuple(padding or _same(kernel.shape[:2])),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    return y if bias is None else y + bias[None, None, None]


def causal_conv3d(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "kt kh kw c d"],
    bias: Float[Array, " d"] | None = None,
    *,
    past: Float[Array, "b p h w c"] | None = None,
    strides: Sequence[int] = (1, 1, 1),
    padding: Padding | None = None,
    implementation: str = "auto",
) -> Float[Array, "b g i j d"]:
    """Three-dimensional convolution that sees no future frame.

    The time axis is never padded after the last frame: the result is the convolution
    of `past` followed by `x`, at the places where the whole kernel fits.

    Args:
        x: frames.
        kernel: weights, the last time tap falling on the current frame.
        bias: added to every position.
        past: frames before `x`. Default: zeros, one less than the kernel's length,
            so that at stride 1 there are as many frames out as in.
        strides: steps along time, height and width.
        padding: zeros before and after height and width. Default: those that keep
            the size at stride 1.
        implementation: "taps" (they lie side by side in one conv2d), "native" (one
            three-dimensional convolution), or "auto": by the backend.

    Returns:
        As many frames as there are places for the kernel, perhaps none.

    Raises:
        ValueError: the implementation is unknown.
    """
    if past is None and x.shape[1] == 1:
        kernel = kernel[-1:]  # what an image lies under; the other taps meet zeros
    taps = kernel.shape[0]
    missing = taps - 1 if past is None else 0
    x = x if past is None else jnp.concatenate([past, x], axis=1)
    if choose_implementation(implementation) == "taps" or taps == 1:
        return _taps_as_channels(x, kernel, bias, missing, strides, padding)
    padding = tuple(padding or _same(kernel.shape[1:3]))
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        tuple(strides),
        ((missing, 0), *padding),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    return y if bias is None else y + bias[None, None, None, None]


def upsample_conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "3 3 c d"],
    bias: Float[Array, " d"] | None = None,
) -> Float[Array, "b i j d"]:
    """Doubles height and width by repetition, then convolves, without the repetition.

    An output pixel's 3 x 3 window falls on only 2 x 2 distinct input pixels, which
    ones depending on whether its row and column are even or odd. Summing the weights
    that meet the same pixel leaves four 2 x 2 kernels, one for each parity: 16 products
    for every input pixel in place of 36, and no enlarged copy of the input.
    """
    height, width = x.shape[1:3]
    rows = jnp.stack([_meet(kernel, even) for even in (True, False)]).swapaxes(1, 2)
    phases = jnp.stack([_meet(rows[i], even) for i in (0, 1) for even in (True, False)])
    phases = rearrange(phases, "p kw kh c d -> kh kw c (p d)")
    # Padded beforehand: with padding of its own, the weight gradient of this
    # convolution is 30 times slower on CPU (jax 0.10).
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = conv2d(x, phases, padding=((0, 0), (0, 0)))
    y = rearrange(y, "b h w (r q d) -> r q b h w d", r=2, q=2)
    y = [
        jnp.stack([y[r, q, :, r : r + height, q : q + width] for q in range(2)], 3)
        for r in range(2)
    ]
    y = rearrange(jnp.stack(y, axis=2), "b h r w q d -> b (h r) (w q) d")
    return y if bias is None else y + bias[None, None, None]


def _meet(kernel: Array, even: bool) -> Array:
    """Sums the two of three taps that fall on the same repeated pixel."""
    first, middle, last = kernel
    pair = (first, middle + last) if even else (first + middle, last)
    return jnp.stack(pair)


def _taps_as_channels(x, kernel, bias, missing, strides, padding):
    """The time taps side by side on the channels of one two-dimensional conv."""
    taps = kernel.shape[0]
    if missing:
        x = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    last = max(x.shape[1] - taps, -1)
    seen = [x[:, i : i + last + 1 : strides[0]] for i in range(taps)]
    x = seen[0] if taps == 1 else jnp.concatenate(seen, axis=-1)
    y = conv2d(
        rearrange(x, "b f h w c -> (b f) h w c"),
        rearrange(kernel, "kt kh kw c d -> kh kw (kt c) d"),
        bias,
        strides=strides[1:],
        padding=padding,
    )
    return rearrange(y, "(b f) h w d -> b f h w d", b=x.shape[0])


def _same(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(((size - 1) // 2, size // 2) for size in sizes)


def inflated(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Random kernels for the current frame, zeros for those before it.

    A new video network treats each frame as an image, so that what it learns of images
    carries over to videos (arXiv:2503.20314, section 4.1).
    """
    spatial, taps = shape[-4:], math.prod(shape[:-4])
    now = nn.initializers.lecun_normal()(key, spatial, dtype)
    return jnp.zeros((taps, *spatial), dtype).at[-1].set(now).reshape(shape)


def copies(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Kernels kt x 1 x 1 that copy the current frame's channels, as often as fits."""
    channels, features = shape[-2:]
    eye = jnp.tile(jnp.eye(channels, dtype=dtype), (1, -(-features // channels)))
    return jnp.zeros(shape, dtype).at[-1, 0, 0].set(eye[:, :features])


class Convolution(Layer):
    """Convolution over frames (two kernel sizes) or, causally, over video (three).

    Attributes:
        features: channels out.
        kernel_size: (height, width) or (time, height, width).
        strides: steps along time, height and width.
        padding: zeros before and after height and width; None keeps the size.
        upsample: double height and width by repetition first.
        kernel_init: of the kernel.
    """

    features: int
    kernel_size: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    padding: Padding | None = None
    upsample: bool = False
    kernel_init: nn.initializers.Initializer = inflated

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        past: Float[Array, "b p h w c"] | None = None,
    ) -> Float[Array, "b g i j d"]:
        """Convolves frames; `past` overrides the cached (or zero) frames before.

        Devices divide the result along its longer side, whichever axis of the kernel
        they divide: edges are sent, and kernels gathered.
        """
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.constant("bias", 0, self.features)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        if self.upsample:
            y = upsample_conv2d(rearrange(x, "b f h w c -> (b f) h w c"), kernel, bias)
            y = rearrange(y, "(b f) h w d -> b f h w d", b=x.shape[0])
        else:
            kernel = kernel[None] if len(self.kernel_size) == 2 else kernel
            if past is None:
                past = recall(self, x, kernel.shape[0] - 1)
            form = {"strides": self.strides, "padding": self.padding}
            y = causal_conv3d(x, kernel, bias, past=past, **form)
        return constrain(y, *frame_axes(y))


def recall(
    module: nn.Module, x: Float[Array, "b f h w c"], frames: int
) -> Float[Array, "b p h w c"] | None:
    """The last frames that a module saw before `x`; None at the start of a video.

    Where the collection "cache" is mutable, the last frames of `x` take their place
    for the next call; else every call is a whole video. Where devices divide the frames
    of a call, each but the first looks back at those of the device before it.
    """
    chunked = module.is_mutable_collection("cache") and not module.is_initializing()
    if not (frames and chunked):
        return None
    begun = module.has_variable("cache", "frames")
    past = module.get_variable("cache", "frames") if begun else None
    before = jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:]))
    seen = jnp.concatenate([before if past is None else past, x], axis=1)
    last = seen[:, -frames:]
    if frames_divided():
        past, last = _of_neighbours(past, last)
    module.put_variable("cache", "frames", constrain(last, *frame_axes(last)))
    return past


def _of_neighbours(past: Array, last: Array) -> tuple[Array, Array]:
    """What each device looks back at, and the last frames of all."""
    ways, device = jax.lax.axis_size(FRAMES), jax.lax.axis_index(FRAMES)
    before = jax.lax.ppermute(last, FRAMES, [(i, i + 1) for i in range(ways - 1)])
    final = jnp.where(device == ways - 1, last, jnp.zeros_like(last))
    return jnp.where(device == 0, past, before), jax.lax.psum(final, FRAMES)
