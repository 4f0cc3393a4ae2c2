"""The image encoder: what it refuses, half precision, how pictures are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.models.image_encoder import VARIANTS, ImageEncoder

SIZES = VARIANTS["tiny"]


def drawn(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_half_precision_follows_float32():
    images = drawn((2, 16, 16, 3))
    model = ImageEncoder(**SIZES)
    params = jax.jit(model.init)(jax.random.key(0), images)
    full = jax.jit(model.apply)(params, images)
    half = jax.jit(ImageEncoder(**SIZES, dtype="bfloat16").apply)(params, images)
    assert full.shape == (2, 17, 32) and half.dtype == jnp.bfloat16
    error = np.linalg.norm(half.astype(jnp.float32) - full) / np.linalg.norm(full)
    assert 1e-5 < error < 0.05


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="16x24 pixels must have 16x16"):
        ImageEncoder(**SIZES).init(jax.random.key(0), drawn((1, 16, 24, 3)))
    with pytest.raises(ValueError, match=r"`activation` \(='relu'\)"):
        ImageEncoder(**SIZES | {"activation": "relu"}).init(
            jax.random.key(0), drawn((1, 16, 16, 3))
        )
