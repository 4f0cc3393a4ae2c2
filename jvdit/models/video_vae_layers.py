"""Layers of the video autoencoder: causal, and able to continue from a cache.

Each layer that looks back in time keeps the frames it will want again in the
collection "cache". Where that collection is mutable, a call continues where the cache
it was given ends, and without a cache it begins a new video; where it is not, every
call is a whole video. Whole and chunked are therefore the same layers and the same
arithmetic.

The architecture is that of the Wan 2.1 and 2.2 VAEs (Wan team 2025, arXiv:2503.20314,
section 4.1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution, copies, inflated, recall
from jvdit.models.dense import Layer
from jvdit.models.layers import RMSNorm
from jvdit.sharding import constrain, frame_axes

# Largest number of attention scores held at once; more frames than fit go in turns.
SCORES_AT_ONCE = 2**26


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
