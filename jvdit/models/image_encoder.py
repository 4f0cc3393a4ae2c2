"""CLIP's image encoder (arXiv:2103.00020): a picture to one state for each patch.

Wan 2.1 image-to-video reads the states before the LAST layer of the released network.
A module loaded from there has one layer less than the release, and no final norm.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.dense import Dense, Layer
from jvdit.models.dit_blocks import Attention
from jvdit.models.layers import LayerNorm, Mlp
from jvdit.sharding import constrain

# Sizes by name: `ImageEncoder(**VARIANTS[name])`. Wan's has 31 of the release's 32
# layers, see above.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip-vit-h-14": {
        "width": 1280,
        "depth": 31,
        "num_heads": 16,
        "ffn_width": 5120,
        "patch_size": 14,
        "image_size": 224,
        "activation": "gelu",
    },
    "tiny": {
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "ffn_width": 48,
        "patch_size": 4,
        "image_size": 16,
        "activation": "quick_gelu",
    },
}


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU with a sigmoid in place of the normal distribution (arXiv:1606.08415)."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
}


class TokenEmbed(Layer):
    """A class token and the patches of a picture, each with a learned position.

    Attributes: as in `ImageEncoder`.
    """

    width: int
    patch_size: int

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b i d"]:
        """Embeds patches row by row, behind the class token."""
        side = self.patch_size
        x = rearrange(images, "b (h y) (w x) c -> b (h w) (y x c)", y=side, x=side)
        x = Dense(self.width, use_bias=False, name="patch", **self.types)(x)
        init = nn.initializers.normal(self.width**-0.5)
        first = self.param("embedding", init, (self.width,), self.param_dtype)
        shape = (1 + x.shape[1], self.width)
        table = self.param("table", init, shape, self.param_dtype)
        first = jnp.broadcast_to(first[None, None], (x.shape[0], 1, self.width))
        x = jnp.concatenate([first.astype(self.dtype), x], axis=1)
        return x + table.astype(self.dtype)[None]


class ImageBlock(Layer):
    """Self-attention and an MLP, both residual with the norm before.

    Attributes: as in `ImageEncoder`.
    """

    num_heads: int
    ffn_width: int
    activation: str
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b i d"]) -> Float[Array, "b i d"]:
        """Updates the states; every one sees every other."""
        kinds = self.types
        y = LayerNorm(self.eps, name="attention_norm", **kinds)(x)
        attention = Attention(self.num_heads, qk_norm=False, name="attention", **kinds)
        x = x + attention(y, y)
        y = LayerNorm(self.eps, name="mlp_norm", **kinds)(x)
        activation = ACTIVATIONS[self.activation]
        x = x + Mlp(self.ffn_width, x.shape[-1], activation, name="mlp", **kinds)(y)
        return constrain(x, "batch", None, None)


class ImageEncoder(Layer):
    """Encodes a picture to the states of a class token and of its patches.

    Attributes:
        width: channels of a state.
        depth: number of blocks; for Wan one less than the release has.
        num_heads: attention heads; they divide `width`.
        ffn_width: hidden channels of the MLP.
        patch_size: pixels along a side of a patch.
        image_size: pixels along a side of a picture.
        activation: of the MLP, a row of `ACTIVATIONS`.
        eps: of every norm.
        dtype: type of the computation; norms and softmax stay float32.
    """

    width: int
    depth: int
    num_heads: int
    ffn_width: int
    patch_size: int
    image_size: int
    activation: str
    eps: float = 1e-5

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b i d"]:
        """Encodes pictures that `preprocess` made.

        Returns:
            States of type `dtype` as they leave the last block, without a norm: the
            class token first, then the patches row by row.

        Raises:
            ValueError: the pictures have another size, or the activation is unknown.
        """
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"`activation` (={self.activation!r}) must be in: {known}."
            )
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {images.shape[1]}x{images.shape[2]} pixels must have "
                f"{self.image_size}x{self.image_size}; `preprocess` makes them so."
            )
        x = TokenEmbed(name="embed", **self.fields_of(TokenEmbed))(images)
        x = LayerNorm(self.eps, name="norm", **self.types)(x)
        x = constrain(x, "batch", None, None)
        for i in range(self.depth):
            x = ImageBlock(name=f"block_{i}", **self.fields_of(ImageBlock))(x)
        return x
