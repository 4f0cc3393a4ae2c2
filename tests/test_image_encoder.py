"""The image encoder: what it refuses, half precision, how pictures are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.models.image_encoder import MEAN, STD, VARIANTS, ImageEncoder, preprocess

SIZES = VARIANTS["tiny"]


def drawn(shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_half_precision_follows_float32():
    images = drawn((2, 16, 16, 3))
    model = ImageEncoder(**SIZES)
    params = model.init(jax.random.key(0), images)
    full = model.apply(params, images)
    half = ImageEncoder(**SIZES, dtype="bfloat16").apply(params, images)
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


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_the_middle_of_a_picture_is_kept(shape):
    axis = 1 + shape.index(24)
    colours = np.repeat([10, 200, 90], 8).reshape([-1 if n == 24 else 1 for n in shape])
    picture = np.broadcast_to(colours[None, ..., None], (1, *shape, 3))
    found = preprocess(jnp.asarray(picture, jnp.uint8), 16)
    assert found.shape == (1, 16, 16, 3)
    found = found * np.reshape(STD, (1, 1, 1, 3)) + np.reshape(MEAN, (1, 1, 1, 3))
    inner = np.asarray(found).take(range(3, 13), axis)
    np.testing.assert_allclose(inner, 200 / 255, atol=1e-6)
