"""Attention patterns: against naive masks, in every form, and what costs less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_exact import exact, roundings
from closeness import assert_close
from packed_rows import REACH, packed, row_of, tokens_of

from jvdit.data.patches import grid_frames
from jvdit.machine.chips import Blocks
from jvdit.models.attention import mosaic, tiles
from jvdit.models.attention.dispatch import attention
from jvdit.models.attention.patterns import PATTERNS, rules
from jvdit.shapes import Text, apart
from jvdit.sharding import make_mesh

NAMES = [*PATTERNS]
GRID = [((5, 2, 4), 8.0, 0)]  # a clip of 40 tokens


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "LEAST", 16)
    monkeypatch.setattr(tiles, "MOST", 16)
    blocks = Blocks((128,) * 3, (128,) * 3, cores=2, gradients=0)
    monkeypatch.setattr(mosaic, "_blocks", lambda: blocks)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def seen(tokens, name):
    return rules(tokens, [name], REACH)[name]


def shown(rows, name, cut=False):
    return np.stack([row.shows(name, cut) for row in rows])


def laid(x, ways, kinds):
    """Tokens as devices along `context` have them: each its share of every kind."""
    parts = np.split(x, [kinds[0]], axis=1) if kinds else [x]
    parts = [p.reshape(len(p), ways, -1, *p.shape[2:]) for p in parts]
    return np.concatenate(parts, axis=2).reshape(x.shape)


def outputs(qkv, mesh=None, **how):
    """The result of attention, and the gradients of something made of it."""

    def loss(q, k, v):
        out = attention(q, k, v, **how)
        return jnp.sum(out * draw(*out.shape, seed=3)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if mesh is None:
        grads, out = run(*qkv)
    else:
        with jax.set_mesh(mesh):
            grads, out = run(*qkv)
    return jax.tree.map(np.asarray, (out, *grads))


def agree(found, qkv, mask):
    want = exact(*qkv, draw(*found[0].shape, seed=3), mask)
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours, theirs, roundings(*qkv[:2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sounds", [False, True])
def test_positions_tell_what_a_pattern_shows(name, sounds):
    rows, kinds = packed(sounds)
    tokens = tokens_of(rows, kinds)
    found = np.asarray(seen(tokens, name).mask())
    real = tokens.segment > 0
    want = shown(rows, name)
    np.testing.assert_array_equal(found[real], want[real])
    assert not found[~real][:, 0].any(), "padding sees no clip"
    assert name == "full" or want.sum() < shown(rows, "full").sum()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_apart_stays_so_in_every_pattern(name):
    rows, kinds = packed()
    tokens, text = tokens_of(rows, kinds), Text(draw(2, 3, 4), jnp.ones((2, 3), int))
    for chosen in (True, False):
        cut, _ = apart(tokens, text, jnp.full((2, 4), chosen))
        found = np.asarray(seen(cut, name).mask())
        real = np.asarray(tokens.segment > 0)
        np.testing.assert_array_equal(found[real], shown(rows, name, chosen)[real])


def test_frames_given_between_others_and_sound_alone_have_numbers_too():
    (row,) = [row_of([((3, 1, 2), 8.0, 0)], 6)]
    row.position[:, 0] = [0.0, 0.0, 0.5, 0.5, 0.25, 0.25]  # the last lies between
    mask = np.asarray(seen(tokens_of([row]), "chunk_causal").mask()[0])
    np.testing.assert_array_equal(mask[0], [1, 1, 0, 0, 1, 1])
    assert mask[2].all()
    # Without its pictures, which are padding here, a sound has frames of its own.
    rows, kinds = packed()
    rows[0].clip[:48] = 0
    heard = tokens_of(rows, kinds)
    for name, count in (("spatial", 1), ("temporal", 9), ("full", 9)):
        mask = np.asarray(seen(heard, name).mask())[0, rows[0].clip == 3]
        assert (mask.sum(axis=-1) == count).all(), name


@pytest.mark.parametrize("form", ["mapped", "xla", "mosaic"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_form_agrees_with_a_naive_mask_and_in_its_gradients(form, name):
    rows, kinds = packed()
    channels, repeats = (128, 3) if form == "mosaic" else (8, 1)
    visible, mask = seen(tokens_of(rows, kinds), name), shown(rows, name)
    # Kernels get several blocks: the row, and clips of other numbers behind it.
    visible = jax.tree.map(
        lambda x: jnp.concatenate([x + 9999 * i for i in range(repeats)], 1), visible
    )
    mask = np.stack([np.kron(np.eye(repeats, dtype=bool), x) for x in mask])
    real = np.tile(np.stack([row.clip > 0 for row in rows]), repeats)
    n = mask.shape[1]
    q, k, v = (draw(2, n, 2, channels, seed=i) for i in range(3))
    # Whose padding sees what doesn't matter, so nobody looks.
    visible = visible._replace(
        id=jnp.where(real, visible.id, -1),
        high=jnp.where(real, visible.low if visible.high is None else visible.high, -1),
    )
    mask = mask & real[:, None] & real[..., None]
    found = outputs((q, k, v), visible=visible, implementation=form, pattern=name)
    agree(found, (q, k, v), mask)


@pytest.mark.parametrize(
    "sizes, heads",
    [
        ({"context": 8}, 8),  # Ulysses alone
        ({"context": 8}, 1),  # a ring alone
        ({"context": 8}, 2),  # two heads: a ring of four
        ({"context": 4, "tensor": 2}, 4),
    ],
)
@pytest.mark.parametrize("name", NAMES[1:])
def test_divided_is_whole_and_so_are_the_gradients(sizes, heads, name):
    rows, kinds = packed()
    tokens = tokens_of(rows, kinds)
    qkv = [draw(2, 64, heads, 8, seed=i) for i in range(3)]
    lay = lambda x: laid(np.asarray(x), sizes["context"], kinds)  # noqa: E731
    visible = jax.tree.map(lambda x: jnp.asarray(lay(x)), seen(tokens, name))
    mask = lay(shown(rows, name))
    mask = np.swapaxes(lay(np.swapaxes(mask, 1, 2)), 1, 2)
    found = outputs(qkv, make_mesh(sizes), visible=visible, pattern=name)
    real = lay(tokens.segment > 0)
    want = exact(*qkv, draw(*found[0].shape, seed=3), mask)
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours[real], theirs[real], roundings(*qkv[:2]))


@pytest.mark.parametrize("sizes", [None, {"context": 8}, {"context": 4, "data": 2}])
@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_rows_of_one_grid_are_folded_and_cost_less(name, sizes):
    rows = [row_of(GRID, 40)] * 2
    visible, mask = seen(tokens_of(rows), name), shown(rows, name)
    mesh = sizes and make_mesh(sizes)
    qkv = [draw(2, 40, 8, 8, seed=i) for i in range(3)]
    agree(outputs(qkv, mesh, visible=visible, pattern=name, frames=5), qkv, mask)
    # Without a ring `visible` isn't looked at.
    hidden = jax.tree.map(jnp.zeros_like, visible)
    agree(outputs(qkv, mesh, visible=hidden, pattern=name, frames=5), qkv, mask)


@pytest.mark.parametrize("name", ["spatial", "temporal", "chunk_causal"])
def test_tiles_that_nobody_sees_are_left_out(name):
    """What lies there may be no numbers: zero times them isn't zero."""
    (row,) = rows = [row_of([((8, 4, 6), 8.0, 0)], 192)]
    mask = shown(rows, name)
    order = row.cell if name == "temporal" else row.frame
    later = order >= order.max() // 2 + 1
    qkv = [draw(1, 192, 2, 8, seed=i) for i in range(3)]
    bad = [jnp.where(later[None, :, None, None], jnp.nan, x) for x in qkv]
    how = {"visible": seen(tokens_of(rows), name), "implementation": "mapped"}
    found = outputs(bad, pattern=name, **how)
    want = exact(*qkv, draw(1, 192, 2, 8, seed=3), mask)
    if name == "chunk_causal":  # later queries see earlier keys
        found, want = found[:2], want[:2]
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours[:, ~later], theirs[:, ~later], roundings(*qkv[:2]))
    assert (
        not np.isfinite(outputs(bad, pattern="full", **how)[0])
        .all(axis=(0, 2, 3))
        .any()
    )


def test_a_grid_is_known_by_its_positions():
    whole = row_of(GRID, 40).position[None]
    assert grid_frames(whole) == 5
    assert grid_frames(np.concatenate([whole, 2 * whole])) == 5
    assert grid_frames(row_of([((1, 2, 4), 8.0, 0)], 8).position[None]) == 1
    other = row_of([((4, 2, 5), 8.0, 0)], 40).position[None]
    assert grid_frames(np.concatenate([whole, other])) == 0
    assert grid_frames(np.concatenate([whole, whole[:, :8]], axis=1)) == 0  # given
    assert grid_frames(whole[:, ::-1]) == 0
