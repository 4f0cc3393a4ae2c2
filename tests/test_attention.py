"""Attention: all its forms against float64, what they see, and rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_exact import PATTERNS, clips, exact, roundings
from closeness import assert_close

import jvdit.models.attention.dispatch as attention_module
from jvdit.models.attention.dispatch import (
    attention,
    rope_tables,
    rotate,
    wan_axes_dims,
)
from jvdit.models.attention.pieces import RESIDUALS
from jvdit.shapes import Visible

FORMS = ["mapped", "steady", "xla", "cudnn", "auto"]

# The third query's segment has no key; the last two tokens are padding.
Q_SEGMENT = np.array([[1, 1, 4, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
KV_SEGMENT = np.array([[1, 2, 2, 2, 0], [1, 1, 1, 1, 0]], np.int32)


@pytest.fixture(autouse=True)
def stand_in_for_cudnn(monkeypatch):
    """Plain attention with cuDNN's rule, wherever the tests run."""
    plain = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **settings):
        if implementation == "cudnn":
            assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        return plain(q, k, v, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def qkv():
    return draw(2, 7, 3, 8), draw(2, 5, 3, 8, seed=1), draw(2, 5, 3, 8, seed=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_form_agrees_with_float64_and_in_its_gradients(form, pattern, qkv):
    visible, mask = pattern(Q_SEGMENT, KV_SEGMENT)
    slope = draw(2, 7, 3, 8, seed=3)

    def loss(q, k, v):
        out = attention(q, k, v, visible, implementation=form)
        return jnp.sum(out * slope), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    want = exact(*qkv, slope, mask)
    for ours, theirs in zip((out, *grads), want, strict=True):
        assert_close(ours, theirs, roundings(*qkv[:2]))
        assert np.abs(ours).max() > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_a_query_without_keys_gets_zeros_and_finite_gradients(form, qkv):
    visible, _ = clips(np.full((2, 7), 9), KV_SEGMENT)

    def total(q, k, v):
        out = attention(q, k, v, visible, implementation=form)
        return jnp.sum(out), out

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
    np.testing.assert_array_equal(out, 0)
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_bounds_hold_both_of_their_ends():
    visible = Visible(*(jnp.asarray([x]) for x in ([1, 2, 3, 4], [2, 4], [3, 3])))
    np.testing.assert_array_equal(visible.mask(), [[[0, 1, 1, 0], [0, 0, 0, 0]]])


@pytest.mark.parametrize("keys", ["tokens", "text"])
def test_a_rematerialised_block_keeps_what_was_seen_of_tokens(keys):
    """As many states of a text are still no tokens."""

    def loss(q):
        return attention(q, q, q, keys=keys, implementation="mapped").sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(draw(1, 4, 1, 8)))
    assert (RESIDUALS in program) == (keys == "tokens")


@pytest.mark.parametrize("offset", [-150, 0, 150])
def test_scores_of_any_size_have_finite_weights_and_gradients(offset, qkv):
    # float32's exp ends at 88: then the largest score has to be subtracted.
    q, k, v = qkv
    shift = jnp.ones_like(q[..., :1])
    q = jnp.concatenate([3 * q, shift * offset * 3], axis=-1)
    k, v = (jnp.concatenate([x, shift[:, :5]], axis=-1) for x in (k, v))

    slope = draw(2, 7, 3, 9, seed=3)

    def total(q, k, v):
        out = attention(q, k, v, implementation="mapped")
        return jnp.sum(out * slope), out

    want = exact(q, k, v, slope, np.ones((2, 7, 5), bool))
    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    for ours, theirs in zip((out, *grads), want, strict=True):
        assert_close(ours, theirs, roundings(q, k))


# float16 holds no exponential beyond that of 11; scores go to 17 here.
@pytest.mark.parametrize("dtype, scale", [(jnp.bfloat16, 4), (jnp.float16, 2.5)])
def test_half_precision_keeps_a_float32_softmax(dtype, scale, qkv):
    q, k, v = (x.astype(dtype) for x in qkv)
    q, k = q * scale, k * scale
    out = attention(q, k, v, implementation="mapped")
    assert out.dtype == dtype
    want, *_ = exact(q, k, v, 0 * q, np.ones((2, 7, 5), bool))
    # Weights and values are rounded to as many digits as the type has.
    bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(want).max()
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0, atol=bound)


def test_arguments_that_do_not_fit_raise(qkv):
    with pytest.raises(ValueError, match="`keys` .*'words'.*tokens, text"):
        attention(*qkv, keys="words")
    with pytest.raises(ValueError, match="'flash'.*mapped"):
        attention(*qkv, implementation="flash")


@pytest.mark.parametrize(
    "queries, keys, dtype, form",
    [
        (4096, 512, jnp.bfloat16, "cudnn"),
        (320, 320, jnp.bfloat16, "xla"),  # few scores
        (4096, 512, jnp.float32, "xla"),
    ],
)
def test_a_gpu_gets_the_flash_kernel_where_it_runs_and_pays(
    queries, keys, dtype, form, monkeypatch
):
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")
    q, k = (jnp.zeros((1, n, 4, 64), dtype) for n in (queries, keys))
    assert attention_module._best_implementation(q, k) == form


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_rope_turns_neighbouring_pairs_by_axis(backend, monkeypatch):
    monkeypatch.setattr(attention_module, "platform", lambda: backend)
    x, position = draw(1, 4, 2, 12), draw(1, 4, 3, seed=1) * 30
    tables = rope_tables(position, (6, 4, 2), theta=100.0)
    out = np.asarray(rotate(x, *tables), np.float64)
    frequencies = [100.0 ** (-np.arange(0, dim, 2) / dim) for dim in (6, 4, 2)]
    angle = np.concatenate(
        [
            np.asarray(position, np.float64)[..., axis, None] * f
            for axis, f in enumerate(frequencies)
        ],
        axis=-1,
    )
    pairs = np.asarray(x, np.float64).reshape(1, 4, 2, 6, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)[:, :, None]
    assert_close(out[..., 0::2], turned.real, 32)
    assert_close(out[..., 1::2], turned.imag, 32)


@pytest.mark.parametrize("reach", [1.0, 1e3, 1e5])
def test_rope_tables_are_accurate_at_far_positions(reach):
    position = draw(1, 64, 2) * reach
    scale = (1.0, 7.3)
    cos, sin = jax.jit(lambda p: rope_tables(p, (16, 16), scale=scale))(position)
    frequency = 1e4 ** (-np.arange(0, 16, 2) / 16)
    exact = np.asarray(position, np.float64)
    angle = np.concatenate(
        [exact[..., axis, None] * s * frequency for axis, s in enumerate(scale)], -1
    )
    for channel in (0, 1):
        np.testing.assert_allclose(cos[..., channel::2], np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(sin[..., 1::2], np.sin(angle), atol=2e-6)
    np.testing.assert_array_equal(sin[..., 0::2], -sin[..., 1::2])


def test_scores_depend_on_differences_of_position_only():
    q, k = draw(1, 6, 1, 16), draw(1, 6, 1, 16, seed=1)
    position = draw(1, 6, 3, seed=2) * 8

    def scores(position):
        turn = rope_tables(position, wan_axes_dims(16))
        return jnp.einsum("bnqk,bsqk->bns", rotate(q, *turn), rotate(k, *turn))

    far = position + jnp.asarray([512.0, -64.0, 2048.0])[None, None]
    near = far - jnp.asarray([512.0, -64.0, 2048.0])[None, None]
    assert_close(scores(far), scores(near))
    moved = position.at[:, 0].add(3.0)
    assert np.abs(scores(moved) - scores(position)).max() > 0.1


def test_wan_splits_128_channels_as_44_42_42():
    assert wan_axes_dims(128) == (44, 42, 42)
    assert wan_axes_dims(64) == (24, 20, 20)
    with pytest.raises(ValueError, match=r"\(=15\) must be even; try 16"):
        wan_axes_dims(15)


def test_axes_that_do_not_fit_the_positions_raise():
    for axes_dims in ((6, 6), (6, 3, 3)):
        with pytest.raises(ValueError, match="3 even numbers"):
            rope_tables(draw(1, 4, 3), axes_dims)


@pytest.mark.parametrize("form", ["steady", "mapped"])
def test_a_clip_has_the_same_bits_beside_whatever(form):
    """But not where long keys of others decide how it is computed."""
    q, k, v = (draw(1, 192, 2, 8, seed=i) for i in range(3))
    segment = jnp.asarray(np.repeat([[1, 2]], 96, axis=1))
    visible = Visible.packed(segment)
    run = jax.jit(partial(attention, implementation=form))
    alone = run(q, k, v, visible)[:, :96]
    among = run(q, k.at[:, 96:].mul(1e3), v, visible)[:, :96]
    assert np.array_equal(alone, among) == (form == "steady")
