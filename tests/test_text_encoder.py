"""The text encoder: packing, relative positions, layer forms."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from stacks import stack_layers

from jvdit.data.tokenizer import Tokenizer, train_tokenizer
from jvdit.models.text_encoder import VARIANTS, TextEncoder, relative_buckets
from jvdit.weights import encoders
from jvdit.weights.encoders import CaptionEncoder
from jvdit.weights.parameters import Network

SIZES = {**VARIANTS["tiny"], "vocab_size": 50, "num_buckets": 8, "max_distance": 6}
SEGMENT = jnp.asarray([[1] * 9 + [2] * 4 + [0] * 3])


@functools.cache
def model_and_params(**fields):
    model = TextEncoder(**SIZES | fields)
    params = jax.jit(model.init)(jax.random.key(0), ids(16), SEGMENT)["params"]
    return jax.jit(model.apply), params


def ids(length, seed=0):
    drawn = np.random.default_rng(seed).integers(2, 50, (1, length))
    return jnp.asarray(drawn, jnp.int32)


@pytest.mark.parametrize("shared_bias", [True, False])
def test_a_packed_caption_gets_what_it_gets_alone(shared_bias):
    apply, params = model_and_params(shared_bias=shared_bias)
    row = ids(16)
    out = apply({"params": params}, row, SEGMENT)
    first = apply({"params": params}, row[:, :9], jnp.ones((1, 9), jnp.int32))
    second = apply({"params": params}, row[:, 9:13], jnp.ones((1, 4), jnp.int32))
    assert_close(out[:, :9], first)
    assert_close(out[:, 9:13], second)
    np.testing.assert_array_equal(out[:, 13:], 0)
    assert np.std(first) > 0.5


def test_an_unpadded_caption_moves_freely_in_its_row():
    apply, params = model_and_params()
    row = ids(6)
    alone = apply({"params": params}, row, jnp.ones((1, 6), jnp.int32))
    late = jnp.concatenate([ids(5, seed=1), row], axis=1)
    segment = jnp.asarray([[0] * 5 + [3] * 6])
    moved = apply({"params": params}, late, segment)
    assert_close(moved[:, 5:], alone)


def test_the_order_of_tokens_matters():
    apply, params = model_and_params()
    row, segment = ids(6), jnp.ones((1, 6), jnp.int32)
    out = apply({"params": params}, row, segment)
    back = apply({"params": params}, row[:, ::-1], segment)[:, ::-1]
    assert np.abs(out - back).max() > 0.01


def test_no_gradient_crosses_segments():
    apply, params = model_and_params()

    def first(table):
        tree = params | {"token_embed": {"embedding": table}}
        row = jnp.arange(16, dtype=jnp.int32)[None]
        return jnp.sum(apply({"params": tree}, row, SEGMENT)[:, :9] ** 3)

    grad = jax.grad(first)(params["token_embed"]["embedding"])
    assert np.abs(grad[:9]).max(axis=1).min() > 0
    np.testing.assert_array_equal(grad[9:], 0)


@pytest.mark.parametrize("shared_bias", [True, False])
def test_scanned_layers_are_unrolled_layers(shared_bias):
    apply, params = model_and_params(shared_bias=shared_bias)
    scanned = TextEncoder(**SIZES, shared_bias=shared_bias, scan_layers=True)
    stacked = stack_layers(params)
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), ids(16), SEGMENT)
    assert jax.tree.structure(stacked) == jax.tree.structure(shapes["params"])
    assert_close(
        jax.jit(scanned.apply)({"params": stacked}, ids(16), SEGMENT),
        apply({"params": params}, ids(16), SEGMENT),
    )


def test_buckets_are_exact_near_and_logarithmic_far():
    buckets = relative_buckets(200, 32, 128)
    behind, ahead = buckets[199, ::-1], buckets[0]
    np.testing.assert_array_equal(behind[:8], np.arange(8))
    np.testing.assert_array_equal(ahead[1:], behind[1:] + 16)
    # 8 buckets for distances 8 to 128: each spans a factor of 2 ** 0.5.
    edges = np.flatnonzero(np.diff(behind)) + 1
    np.testing.assert_array_equal(edges[8:], [12, 16, 23, 32, 46, 64, 91])
    assert behind.max() == 15 and ahead.max() == 31


def test_buckets_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"`num_buckets` \(=30\)"):
        relative_buckets(4, 30, 128)
    with pytest.raises(ValueError, match=r"`max_distance` \(=8\)"):
        relative_buckets(4, 32, 8)


def test_half_precision_follows_float32():
    apply, params = model_and_params()
    full = apply({"params": params}, ids(16), SEGMENT)
    half = jax.jit(TextEncoder(**SIZES, dtype="bfloat16").apply)(
        {"params": params}, ids(16), SEGMENT
    )
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(half.astype(jnp.float32) - full) / np.linalg.norm(full)
    assert 1e-5 < error < 0.05


def test_the_empty_caption_of_a_release_is_read_without_its_encoder(
    tmp_path, monkeypatch
):
    """It is kept beside the latents: the encoder of a release has gigabytes."""
    tokenizer = Tokenizer(train_tokenizer(["a red circle moves up"] * 20, 280))
    module = TextEncoder(**SIZES | {"vocab_size": tokenizer.vocab_size})
    _, params = model_and_params(vocab_size=tokenizer.vocab_size)
    release, latents = tmp_path / "release", tmp_path / "latents"
    latents.mkdir()
    encoder = CaptionEncoder(Network(module, params), tokenizer, str(release))
    encoder.save(latents)

    def unread():
        raise AssertionError("the encoder was read")

    found = types.SimpleNamespace(parts={"text_encoder": release}, tokenizer=release)
    for name, value in {
        "model_folder": lambda folder: folder,
        "is_release": lambda folder: folder == release,
        "read_release": lambda folder: found,
        "load_text_encoder": lambda folder: Network(module, unread),
        "release_tokenizer": lambda file: tokenizer,
    }.items():
        monkeypatch.setattr(encoders, name, value)
    loaded = CaptionEncoder.load(latents)
    np.testing.assert_array_equal(loaded.null, encoder([""], 1)[0])
    (latents / "empty_caption.npy").unlink()  # latents from before it was kept
    with pytest.raises(AssertionError, match="was read"):
        _ = CaptionEncoder.load(latents).null
