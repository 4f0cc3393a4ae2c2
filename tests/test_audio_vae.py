"""Tests of the audio autoencoder: shapes, reach, windows, gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.models.audio_vae import VARIANTS, AudioVAE
from jvdit.models.audio_vae_chunked import decode_sound, encode_sound
from jvdit.models.audio_vae_layers import sine_squared
from jvdit.training.objectives.waveform import AudioVAEObjective, spectra

TINY = AudioVAE(**VARIANTS["tiny"])


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape), jnp.float32)


@pytest.fixture(scope="module")
def params():
    made = TINY.init(jax.random.key(0), jnp.zeros((1, 12, 1)))["params"]
    # Every layer counts, those that start at zero too.
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def test_sounds_of_any_length_come_back_in_their_length(params):
    for samples in (1, 11, 12, 13, 100):
        sound = random(2, samples, 1)
        found: Any = TINY.apply({"params": params}, sound)
        decoded, mean, logvar = found
        latents = -(-samples // TINY.hop)
        assert decoded.shape == sound.shape
        assert mean.shape == logvar.shape == (2, latents, 4)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_nothing_is_seen_beyond_the_margins(params, half):
    """By gradients: what a latent, or a sample, in the middle depends on."""
    count = 2 * max(TINY.margins) + 9
    middle = count // 2
    if half == "encode":
        x, hop, margin = random(1, count * TINY.hop, 1), TINY.hop, TINY.margins[0]

        def chosen(x):  # pyright: ignore[reportRedeclaration]
            return TINY.apply({"params": params}, x, method="encode")[0][:, middle]
    else:
        x, hop, margin = random(1, count, 4), 1, TINY.margins[1]

        def chosen(x):
            start = middle * TINY.hop
            decoded = TINY.apply({"params": params}, x, method="decode")
            return decoded[:, start : start + TINY.hop]

    found = jax.jacobian(chosen)(x)
    weight = np.abs(found).reshape(-1, *x.shape[1:]).sum((0, 2))
    reached = np.flatnonzero(weight > 0) // hop
    assert middle - margin <= reached.min() < middle < reached.max() <= middle + margin
    # And the margins aren't wasteful.
    assert reached.max() - reached.min() >= 2 * margin - 6


def test_windows_are_the_whole(params):
    """In float64 arithmetic's terms: relative to the largest value."""
    sound = random(2, 700, 1)
    vae = TINY.clone(latents_mean=(0.1,) * 4, latents_std=(2.0,) * 4)
    mean, logvar = TINY.apply({"params": params}, sound, method="encode")
    window = 2 * max(TINY.margins) + 7
    assert mean.shape[1] > 2 * window - 2 * max(TINY.margins)
    found = encode_sound(vae, params, sound, window)
    assert_close(found[0], mean)
    assert_close(found[1], logvar)
    whole = TINY.apply({"params": params}, mean, method="decode")
    assert_close(decode_sound(vae, params, vae.normalize(mean), window), whole)


def test_the_square_of_a_sine_and_its_derivative():
    angles = np.concatenate([np.linspace(-7, 7, 2001), np.geomspace(1e-6, 2e4, 999)])
    x = angles.astype(np.float32)
    exact = np.sin(x.astype(np.float64)) ** 2, np.sin(2 * x.astype(np.float64))
    found = jax.vmap(jax.value_and_grad(sine_squared))(jnp.asarray(x))
    assert_close(found, exact, roundings=8)
    small = np.abs(x) < 1
    np.testing.assert_allclose(found[0][small], exact[0][small], rtol=1e-6)


def test_a_wrong_number_of_channels_is_refused(params):
    with pytest.raises(ValueError, match="2 channels but `channels` is 1"):
        TINY.apply({"params": params}, random(1, 24, 2), method="encode")
    with pytest.raises(ValueError, match="`latent_channels` is 4"):
        TINY.apply({"params": params}, random(1, 3, 5), method="decode")
    with pytest.raises(ValueError, match="`channels`"):
        TINY.clone(channels=3).init(jax.random.key(0), jnp.zeros((1, 12, 3)))


def test_a_new_one_is_quiet():
    """Its output starts near silence, from which it learns faster than from noise."""
    vae = AudioVAE(**VARIANTS["world"])
    sound = random(1, 6400, 1)
    decoded = jax.jit(lambda x: vae.init_with_output(jax.random.key(0), x)[0][0])(sound)
    assert np.std(decoded) < np.std(sound)


def test_spectra_have_the_amplitude_of_a_sine():
    time = np.arange(4096, dtype=np.float32)
    sine = 0.5 * np.sin(2 * np.pi * 16 / 256 * time)[None, :, None]
    level = np.asarray(spectra(jnp.asarray(sine), 256))
    assert level.shape == (1, 61, 129, 1)
    np.testing.assert_allclose(level[0, 4:-4, 16, 0], 0.5, rtol=1e-3)
    assert level[0, 4:-4, 40:].max() < 1e-3


def test_the_loss_is_least_for_the_sound_itself_and_has_gradients():
    objective = AudioVAEObjective(TINY, windows=(16, 64))
    sound = jnp.asarray(random(2, 96, 1))
    same = objective._spectral(sound, sound)
    other = objective._spectral(sound * 0.5, sound)
    assert max(map(np.max, same)) == 0 < min(map(np.min, other))
    batch = {"audio": jnp.stack([sound[0], jnp.zeros((96, 1))])}
    batch["valid"] = jnp.ones(2, bool)
    params = objective.init(jax.random.key(0), batch)
    batch = objective.prepare(batch, jax.random.key(1))
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, batch)[0]))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
