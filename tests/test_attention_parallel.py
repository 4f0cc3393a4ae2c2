"""Attention divided over a mesh is attention; so is the TPU's kernel, interpreted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_exact import exact, roundings
from closeness import assert_close

from jvdit.models.attention import mosaic, parallel
from jvdit.models.attention.dispatch import attention
from jvdit.sharding import make_mesh, platform

ROWS, TOKENS, HEADS, CHANNELS = 2, 16, 4, 8


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def outputs(mesh, qkv, segments, form="auto"):
    """The result of attention, and the gradients of something made of it."""

    def loss(q, k, v):
        out = attention(q, k, v, *segments, implementation=form)
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
    return jnp.asarray(np.stack([first, second]), jnp.int32)


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
@pytest.mark.parametrize("clips", [False, True])
def test_divided_is_whole_and_so_are_the_gradients(sizes, heads, clips):
    qkv = [draw(ROWS, TOKENS, heads, CHANNELS, seed=i) for i in range(3)]
    segments = (packed(TOKENS),) * 2 if clips else ()
    whole = outputs(None, qkv, segments, "xla")
    parts = outputs(make_mesh(sizes), qkv, segments)
    for ours, plain in zip(parts, whole, strict=True):
        assert_close(ours, plain, roundings(*qkv[:2]))


def test_every_device_has_all_of_the_text():
    text = packed(8)
    qkv = draw(2, 16, 4, 8), draw(2, 8, 4, 8, seed=1), draw(2, 8, 4, 8, seed=2)
    segments = packed(16), text
    whole = outputs(None, qkv, segments, "xla")
    parts = outputs(make_mesh({"context": 8}), qkv, segments)
    for ours, plain in zip(parts, whole, strict=True):
        assert_close(ours, plain, roundings(*qkv[:2]))


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
    "one": mosaic.Blocks(back=(256, 256, 128), ahead=(256, 256, 128)),
    "two": mosaic.Blocks((128,) * 3, (128,) * 3, cores=2, gradients=0),
}


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", [1, 40])  # of scores: later ones may be beyond numbers
def test_the_kernels_of_tpus_agree(clips, chip, size, monkeypatch):
    # Not whole blocks: 160 tokens lie in 256 places.
    monkeypatch.setattr(mosaic, "_chip", lambda: CHIPS[chip])
    shape = (2, 160, 2, 128)
    q, k, v = (draw(*shape, seed=i) for i in range(3))
    k = k.at[:, 128:, 1].multiply(size)
    segments = (packed(160),) * 2 if clips else ()
    visible = np.ones((2, 160, 160), bool)
    if clips:
        visible = np.asarray(segments[0][:, :, None] == segments[1][:, None])
    want = exact(q, k, v, draw(*shape, seed=3), visible)
    for form in ("xla", "mosaic"):
        found = outputs(None, (q, k, v), segments, form)
        for a, b in zip(found, want, strict=True):
            assert_close(a, b, roundings(q, k))


def test_queries_that_see_nothing_have_no_gradient(monkeypatch):
    monkeypatch.setattr(mosaic, "_chip", lambda: CHIPS["one"])
    for size in (1, 40):
        q, k, v = (size * draw(1, 256, 1, 128, seed=i) for i in range(3))
        segments = packed(256)[:1], jnp.ones((1, 256), jnp.int32)
        for found in outputs(None, (q, k, v), segments, "mosaic")[:2]:
            assert np.abs(found[:, :64]).min(axis=-1).max() > 0
            assert not found[:, 64:].any()


def test_both_cores_of_a_chip_share_blocks_and_the_compiler_knows_their_cost():
    """Of queries in the forward kernel, of keys in the backward one."""
    q, line = draw(1, 256, 3, 128), draw(1, 3, 256)

    def told(run):
        text = str(jax.make_jaxpr(run)())
        (order,) = re.findall(r"dimension_semantics=\((.*?)\)", text)
        (flops,) = re.findall(r"CostEstimate\(flops=(\d+)", text)
        return order, int(flops)

    product = 2 * 3 * 256 * 256 * 128
    order, flops = told(lambda: mosaic.mosaic_forward(q, q, q, ()))
    assert order == "'arbitrary', 'parallel', 'arbitrary'" and flops == 2 * product
    inputs = q, q, q, (), line, line, q
    order, flops = told(lambda: mosaic.mosaic_backward(*inputs))
    assert order == "'arbitrary', 'parallel', 'arbitrary', 'arbitrary'"
    assert flops == 5 * product


@pytest.mark.parametrize("clips", [False, True])
def test_the_kernel_of_tpus_goes_around_a_ring(clips):
    # 80 tokens on each device lie in 128 places.
    qkv = [draw(2, 160, 1, 128, seed=i) for i in range(3)]
    segments = (packed(160),) * 2 if clips else ()
    plain = outputs(None, qkv, segments, "xla")
    ours = outputs(make_mesh({"context": 2, "data": -1}), qkv, segments, "mosaic")
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b, roundings(*qkv[:2]))


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
