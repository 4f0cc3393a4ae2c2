"""The autoencoder's loss tells apart what it is there to tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.models.video_vae import VARIANTS, VideoVAE, to_float, to_uint8
from jvdit.training.objectives.autoencoding import VAEObjective, psnr
from jvdit.training.objectives.perceptual import random_features


class Echo:
    """An autoencoder that gives back its input, changed as it is told."""

    def __init__(self, change):
        self.change = change

    def apply(self, variables, x, method):
        if method == "encode":
            return x, jnp.full(x.shape, -60.0)
        return self.change(x)


def terms(change):
    objective = VAEObjective.__new__(VAEObjective)
    for name, value in {
        "vae": Echo(change),
        "mse": 5.0,
        "perceptual": 0.5,
        "kl": 0.0,
        "temporal": 0.5,
    }.items():
        object.__setattr__(objective, name, value)
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 255, (2, 5, 4, 4, 3)), np.ones((1, 1, 4, 4, 1)))
    video = jnp.asarray(smooth, jnp.uint8)
    batch = {"video": video, "valid": jnp.array([True, False])}
    batch = objective.prepare(batch, jax.random.key(0))
    return objective.loss({"vae": {}}, batch)


def test_what_is_given_back_costs_nothing():
    loss, metrics = terms(lambda x: x)
    assert float(loss) < 1e-5 and float(metrics["psnr"]) > 80


def test_flicker_is_seen_by_the_temporal_term_and_blur_by_the_perceptual():
    sign = jnp.array([1, -1, 1, -1, 1.0])[None, :, None, None, None]
    flicker = terms(lambda x: x + 0.1 * sign)[1]
    offset = terms(lambda x: x + 0.1)[1]
    np.testing.assert_allclose(flicker["l1"], offset["l1"], rtol=1e-4)
    assert flicker["temporal"] > 0.19 and offset["temporal"] < 1e-5

    def blur(x):
        return (x + jnp.roll(x, 1, 2) + jnp.roll(x, 1, 3) + jnp.roll(x, 2, 3)) / 4

    blurred = terms(blur)[1]
    assert blurred["perceptual"] > 2 * offset["perceptual"]


def test_unreadable_videos_do_not_count():
    _, metrics = terms(lambda x: x + 0.1)
    np.testing.assert_allclose(metrics["l1"], 0.1, rtol=1e-4)  # of one video, not two


def test_features_are_the_same_everywhere_and_tell_colours_apart():
    red = jnp.zeros((1, 8, 8, 3)).at[..., 0].set(1.0)
    first, again = random_features(red), random_features(red)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    green = jnp.roll(red, 1, axis=-1)
    assert jnp.abs(first[-1] - random_features(green)[-1]).mean() > 0.05


def test_pixels_round_trip_and_psnr_is_that_of_the_books():
    pixels = jnp.arange(256, dtype=jnp.uint8).reshape(1, 1, 16, 16, 1)
    pixels = jnp.repeat(pixels, 3, axis=-1)
    np.testing.assert_array_equal(to_uint8(to_float(pixels)), pixels)
    a = jnp.zeros((1, 2, 4, 4, 3))
    # 255 levels to [-1, 1]: an error of 0.2 is 25.5 levels, 20 dB.
    np.testing.assert_allclose(psnr(a + 0.2, a), 20.0, rtol=1e-5)


def test_a_new_autoencoder_begins_with_a_narrow_posterior():
    objective = VAEObjective(VideoVAE(**VARIANTS["tiny"]))
    batch = {"video": jnp.zeros((2, 1, 16, 16, 3), jnp.uint8)}
    params = jax.jit(objective.init)(jax.random.key(0), batch)["vae"]
    bias = params["quant_conv"]["bias"]
    np.testing.assert_array_equal(bias[4:], -6.0)
    np.testing.assert_array_equal(bias[:4], 0.0)


@pytest.mark.parametrize("rows", [1, 3])
def test_each_video_has_a_key_of_its_own(rows):
    objective = VAEObjective(VideoVAE(**VARIANTS["tiny"]))
    batch = {"video": jnp.zeros((rows, 1, 16, 16, 3), jnp.uint8)}
    keys = objective.prepare(batch, jax.random.key(0))["key"]
    assert len({bytes(np.asarray(jax.random.key_data(k))) for k in keys}) == rows
