"""Attention divided over a mesh is attention; so is the TPU's kernel, interpreted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_exact import PATTERNS, chunks, clips, exact, roundings
from closeness import assert_close

from jvdit.machine.chips import Blocks
from jvdit.models.attention import mosaic, parallel
from jvdit.models.attention.dispatch import attention
from jvdit.sharding import make_mesh, platform

ROWS, TOKENS, HEADS, CHANNELS = 2, 16, 4, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def outputs(mesh, qkv, visible=None, form="auto", keys="tokens"):
    """The result of attention, and the gradients of something made of it."""

    def loss(q, k, v):
        out = attention(q, k, v, visible, implementation=form, keys=keys)
        return jnp.sum(out * draw(*out.shape, seed=3)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    if mesh is None:
        grads, out = run(*qkv)
    else:
        with jax.set_mesh(mesh):
            grads, out = run(*qkv)
    return jax.tree.map(np.asarray, (out, *grads))


def packed(tokens):
    """Two rows: three clips and padding; one clip, whose end no other sees."""
    first = np.repeat([1, 2, 3, 0], tokens // 4)
    second = np.where(np.arange(tokens) < tokens - 3, 1, 2)
    return np.stack([first, second])


def agree(found, qkv, mask):
    """Asserts that results and gradients are those of float64."""
    want = exact(*qkv, draw(*found[0].shape, seed=3), mask)
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours, theirs, roundings(*qkv[:2]))


@pytest.mark.parametrize(
    "sizes, heads",
    [
        ({"context": 8}, 8),  # Ulysses alone
        ({"context": 8}, 1),  # a ring alone
        ({"context": 8}, 2),  # two heads: a ring of four
        ({"context": 4, "tensor": 2}, 4),
        ({"data": 2, "context": 2, "fsdp": -1}, 4),  # rows don't divide: whole
        ({"data": 2, "tensor": 4}, 4),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_divided_is_whole_and_so_are_the_gradients(sizes, heads, pattern):
    qkv = [draw(ROWS, TOKENS, heads, CHANNELS, seed=i) for i in range(3)]
    visible, mask = pattern(packed(TOKENS), packed(TOKENS))
    agree(outputs(make_mesh(sizes), qkv, visible), qkv, mask)


@pytest.mark.parametrize("keys, tokens", [("text", 8), ("text", 16), ("tokens", 4)])
def test_every_device_has_all_of_the_text(keys, tokens):
    """Also of a text as long as a clip; and of tokens that the mesh doesn't divide."""
    qkv = [draw(2, n, 4, 8, seed=i) for i, n in enumerate((16, tokens, tokens))]
    visible, mask = clips(packed(16), packed(tokens))
    mesh = make_mesh({"context": 8})
    agree(outputs(mesh, qkv, visible, keys=keys), qkv, mask)
    with jax.set_mesh(mesh):
        program = str(jax.make_jaxpr(lambda *x: attention(*x, keys=keys))(*qkv))
    assert not re.search("all_to_all|ppermute", program)


@pytest.mark.parametrize("heads", [8, 2, 1])
@pytest.mark.parametrize("queries, keys", [(16, 32), (32, 16)])
def test_tokens_may_see_more_tokens_or_fewer(queries, keys, heads):
    qkv = [draw(2, n, heads, 8, seed=i) for i, n in enumerate((queries, keys, keys))]
    visible, mask = chunks(packed(queries), packed(keys))
    mesh = make_mesh({"context": 8})
    agree(outputs(mesh, qkv, visible), qkv, mask)
    with jax.set_mesh(mesh):
        program = str(jax.make_jaxpr(attention)(*qkv, visible))
    assert re.search("all_to_all|ppermute", program)


def test_ulysses_takes_what_heads_and_neighbours_allow():
    assert parallel.divide_context(8, 40) == (8, 1)
    assert parallel.divide_context(64, 40) == (8, 8)
    assert parallel.divide_context(16, 12) == (4, 4)
    assert parallel.divide_context(8, 1) == (1, 8)


def test_a_ring_holds_no_more_than_its_part():
    """Nothing on a device is as long as the whole sequence."""
    mesh, tokens = make_mesh({"context": 8}), 512
    q = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v).sum()

    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(None, "context")
        )
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=place)
        text = run.lower(q, q, q).compile().as_text()
    assert "collective-permute" in text
    assert f"[1,{tokens}," not in text


# Of 256 tokens: all at once, but two parts for exponentials; two blocks of queries and
# of keys, the latter for a core each, and room for the gradients of one of the former.
CHIPS = {
    "one": Blocks(back=(256, 256, 128), ahead=(256, 256, 128)),
    "two": Blocks((128,) * 3, (128,) * 3, cores=2, gradients=0),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", [1, 40])  # of scores: later ones may be beyond numbers
def test_the_kernels_of_tpus_agree(pattern, chip, size, monkeypatch):
    # Not whole blocks: 160 tokens lie in 256 places.
    monkeypatch.setattr(mosaic, "_blocks", lambda: CHIPS[chip])
    q, k, v = (draw(2, 160, 2, 128, seed=i) for i in range(3))
    k = k.at[:, 128:, 1].multiply(size)
    visible, mask = pattern(packed(160), packed(160))
    for form in ("xla", "mosaic"):
        agree(outputs(None, (q, k, v), visible, form), (q, k, v), mask)


@pytest.mark.parametrize("chip", CHIPS)
def test_queries_that_see_nothing_have_no_gradient(chip, monkeypatch):
    monkeypatch.setattr(mosaic, "_blocks", lambda: CHIPS[chip])
    for size in (1, 40):
        q, k, v = (size * draw(1, 256, 1, 128, seed=i) for i in range(3))
        visible, _ = clips(packed(256)[:1], np.ones((1, 256), int))
        for found in outputs(None, (q, k, v), visible, "mosaic")[:2]:
            assert np.abs(found[:, :64]).min(axis=-1).max() > 0
            assert not found[:, 64:].any()


@pytest.mark.parametrize("chip", CHIPS)
def test_blocks_of_which_nothing_is_visible_are_left_out(chip, monkeypatch):
    """What lies there may be no numbers: zero times them isn't zero."""
    blocks = dataclasses.replace(CHIPS["two"], cores=CHIPS[chip].cores)
    monkeypatch.setattr(mosaic, "_blocks", lambda: blocks)
    later = jnp.arange(512)[None, :, None, None] >= 256
    qkv = [jnp.where(later, jnp.nan, draw(1, 512, 2, 128, seed=i)) for i in range(3)]
    clip = np.repeat([[1, 2]], 256, 1)
    found = outputs(None, qkv, clips(clip, clip)[0], "mosaic")
    assert all(np.isnan(x[:, 256:]).all() for x in found)
    first = [x[:, :256] for x in qkv]
    want = exact(*first, draw(1, 512, 2, 128, seed=3)[:, :256], np.ones((1, 256, 256)))
    for ours, theirs in zip(found, want, strict=True):
        assert_close(ours[:, :256], theirs, roundings(*first[:2]))


def test_both_cores_of_a_chip_share_blocks_and_the_compiler_knows_their_cost():
    """Of queries in the forward kernel, of keys in the backward one."""
    q, line = draw(1, 256, 3, 128), draw(1, 3, 256)

    def told(run):
        text = str(jax.make_jaxpr(run)())
        (order,) = re.findall(r"dimension_semantics=\((.*?)\)", text)
        (flops,) = re.findall(r"CostEstimate\(flops=(\d+)", text)
        return order, int(flops)

    product = 2 * 3 * 256 * 256 * 128
    order, flops = told(lambda: mosaic.mosaic_forward(q, q, q, None))
    assert order == "'arbitrary', 'parallel', 'arbitrary'" and flops == 2 * product
    inputs = q, q, q, None, line, line, q
    order, flops = told(lambda: mosaic.mosaic_backward(*inputs))
    assert order == "'arbitrary', 'parallel', 'arbitrary', 'arbitrary'"
    assert flops == 5 * product


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_kernel_of_tpus_goes_around_a_ring(pattern):
    # 80 tokens on each device lie in 128 places.
    qkv = [draw(2, 160, 1, 128, seed=i) for i in range(3)]
    visible, mask = pattern(packed(160), packed(160))
    mesh = make_mesh({"context": 2, "data": -1})
    agree(outputs(mesh, qkv, visible, "mosaic"), qkv, mask)


@pytest.mark.parametrize("tokens", [128, 1184, 9450, 32760, 75600])
def test_blocks_leave_little_room(tokens):
    for most in (1024, 2048):
        block = mosaic.block_for(tokens, most)
        assert block % 128 == 0 and min(most / 2, tokens) <= block <= most
        assert -tokens % block < 0.05 * tokens + 128


def test_the_platform_is_that_of_the_mesh():
    assert platform() == jax.default_backend()
    with jax.set_mesh(make_mesh()):
        assert platform() == "cpu"
