"""The diffusion transformer with attention patterns and long skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax.traverse_util import flatten_dict
from packed_rows import REACH, packed, row_of, tokens_of
from products import count_products

from jvdit.models.attention.dispatch import rope_tables, wan_axes_dims
from jvdit.models.dit import VARIANTS, DiT
from jvdit.models.layers import stack_of
from jvdit.shapes import Text, Visible
from jvdit.sharding import make_mesh
from jvdit.weights.fitting import fitted, other_parts

SIZES = {**VARIANTS["tiny"], "in_channels": 4, "out_channels": 4, "text_width": 6}
SIZES |= {"depth": 3, "chunk_frames": REACH.chunk, "window_frames": REACH.window}
ALTERNATING = ("spatial", "temporal")
CAUSAL = ("chunk_causal", "spatial")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def sizes(**fields):
    return SIZES | fields


@functools.cache
def inputs(sounds=True, grid=0):
    """Tokens, noise levels and text; of packed rows, or of rows of one grid."""
    if grid:
        rows = [row_of([((grid, 2, 4), 8.0, 0)], 8 * grid)] * 2
        tokens = tokens_of(rows).replace(segment=None, level=None)
        return tokens, jnp.full((2, 1), 0.4), Text(draw(2, 3, 6))
    rows, kinds = packed(sounds)
    tokens = tokens_of(rows, kinds)
    levels = int(tokens.segment.max()) + 1
    t = jnp.abs(draw(1, levels * (len(kinds) or 1), seed=4)).repeat(2, 0) / 4
    text_segment = jnp.asarray([[1, 1, 2, 3, 4, 0], [1, 1, 1, 1, 0, 0]])
    return tokens, t, Text(draw(2, 6, 6), text_segment)


def shapes_of(model, tokens, t, text):
    made = jax.eval_shape(model.init, jax.random.key(0), tokens, t, text)
    return made["params"]


def params_of(model, *given):
    """Drawn by name and layer, alike for stacked layers and for others."""

    def leaf(path, shape):
        names = [x.key for x in path]
        found = stack_of(names[0])
        rest = "/".join(names[1:])
        if found is None:
            first = names[0] if names[0].startswith("block_") else ""
            return value(first, rest if first else "/".join(names), shape.shape)
        kind, start = found
        each = range(start, start + shape.shape[0])
        return jnp.stack([value(f"{kind}_{i}", rest, shape.shape[1:]) for i in each])

    def value(layer, name, shape):
        seed = [ord(x) for x in f"{layer}/{name}"]
        drawn = np.random.default_rng(seed).normal(size=shape)
        return jnp.asarray(0.3 * drawn + ("scale" in name), jnp.float32)

    shapes = shapes_of(model, *given)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def by_layer(grads):
    """Gradients of stacks as those of layers."""
    flat = {k: v for k, v in grads.items() if stack_of(k) is None}
    for name in grads.keys() - flat.keys():
        kind, start = stack_of(name)
        for i in range(len(jax.tree.leaves(grads[name])[0])):
            flat[f"{kind}_{start + i}"] = jax.tree.map(lambda x, i=i: x[i], grads[name])
    return flat


def learned(given, mesh=None, **fields):
    """The velocity, and the gradient of a loss by the parameters of each layer."""
    model = DiT(**sizes(**fields))
    real = 1 if given[0].segment is None else given[0].segment[..., None] > 0

    def loss(params):
        out = model.apply({"params": params}, *given)
        return jnp.mean(jnp.where(real, out - 1, 0) ** 2), out * real

    run = jax.jit(jax.grad(loss, has_aux=True))
    params = params_of(model, *given)
    if mesh is None:
        grads, out = run(params)
    else:
        with jax.set_mesh(mesh):
            grads, out = run(params)
    return out, by_layer(grads)


def test_scanned_rematerialised_and_divided_networks_are_the_plain_one():
    how = {"patterns": (*ALTERNATING, "chunk_causal"), "sound_channels": 4}
    how["skips"] = True
    plain = learned(inputs(), **how)
    how["scan_layers"] = True
    assert_close(learned(inputs(), **how, remat="attention"), plain, 1024)
    mesh = make_mesh({"context": 4, "data": 2})
    assert_close(learned(inputs(), mesh, **how), plain, 1024)


@pytest.mark.parametrize(
    "fields",
    [{"patterns": ALTERNATING[::-1]}, {"patterns": ()}, {"skips": True}],
    ids=str,
)
def test_patterns_and_skips_change_what_a_network_does(fields):
    given = inputs(sounds=False)
    plain = {"patterns": ALTERNATING}
    found = []
    for how in (plain, plain | fields):
        model = DiT(**sizes(**how))
        params = {"params": params_of(model, *given)}
        found.append(jax.jit(model.apply)(params, *given))
    real = given[0].segment[..., None] > 0
    assert np.abs((found[0] - found[1]) * real).max() > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_rows_of_one_grid_are_what_the_rule_of_visibility_makes_of_them(scan):
    tokens, *rest = given = inputs(grid=5)
    how = {"patterns": ALTERNATING, "scan_layers": scan}
    folded = tokens.replace(frames=5), *rest
    assert_close(learned(folded, **how), learned(given, **how))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("patterns", [CAUSAL[:1], CAUSAL])
def test_no_gradient_comes_from_later_chunks(patterns, scan):
    """Of the whole network, pictures and sounds, in packed rows."""
    tokens, t, text = inputs()
    how = {"patterns": patterns, "scan_layers": scan, "skips": True, "remat": "full"}
    model = DiT(**sizes(**how, sound_channels=4))
    params = params_of(model, tokens, t, text)
    rows, _ = packed()
    clip = np.stack([row.clip for row in rows])
    chunk = np.stack([row.frame for row in rows]) // REACH.chunk

    @jax.jit
    def seen(latents, chosen):
        out = model.apply({"params": params}, tokens.with_latents(latents), t, text)
        return jnp.sum(jnp.where(chosen[..., None], out, 0) ** 2)

    for number, last in ((1, 0), (1, 1), (3, 0), (3, 1), (3, 2)):
        chosen = (clip == number) & (chunk == last)
        chosen[1] = False
        grad = jax.grad(seen)(tokens.latents, jnp.asarray(chosen))
        want = (clip == number) & (chunk <= last)
        want[1] = False
        np.testing.assert_array_equal(np.abs(grad).max(axis=-1) > 0, want)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("depth", [2, 5])
def test_long_skips_start_as_the_plain_network_and_are_learned(depth, scan):
    given = inputs(sounds=False)
    how = {"depth": depth, "scan_layers": scan}
    model = DiT(**sizes(**how, skips=True))
    fresh = jax.jit(model.init)(jax.random.key(0), *given)["params"]
    plain = params_of(DiT(**sizes(**how)), *given)
    kernels = [x["skip"]["kernel"] for x in fresh.values() if "skip" in x]
    kernels = jnp.concatenate([jnp.atleast_3d(x).reshape(-1, 64, 32) for x in kernels])
    assert len(kernels) == depth // 2
    np.testing.assert_array_equal(kernels, np.stack([np.eye(64, 32)] * len(kernels)))

    # So a training may start from the weights of a network without.
    assert other_parts(plain, fresh) and not other_parts(fresh, fresh)
    flat = flatten_dict(fresh, sep="/")
    begun = fitted(plain, fresh, lambda paths: {path: flat[path] for path in paths})

    def loss(params, model):
        return jnp.mean((model.apply({"params": params}, *given) - 1) ** 2)

    without = jax.jit(loss, static_argnums=1)(plain, DiT(**sizes(**how)))
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(begun, model)
    assert_close(value, without)
    for layer in by_layer(grads).values():
        if "skip" in layer:
            halves = jnp.split(layer["skip"]["kernel"], 2)
            assert min(np.abs(x).max() for x in halves) > 1e-6


@pytest.mark.parametrize("scan", [False, True])
def test_the_last_block_takes_what_left_the_first(scan):
    given = inputs(sounds=False)
    model = DiT(**sizes(depth=4, skips=True, scan_layers=scan))
    params = params_of(model, *given)
    name, last = ("blocks_2", (1,)) if scan else ("block_3", ())
    kernel = params[name]["skip"]["kernel"]
    # Nothing of what left the block before.
    params[name]["skip"]["kernel"] = kernel.at[(*last, slice(32))].set(0)

    def loss(params):
        return jnp.mean(model.apply({"params": params}, *given) ** 2)

    grads = by_layer(jax.jit(jax.grad(loss))(params))
    found = [
        max(np.abs(x).max() for x in jax.tree.leaves(grads[f"block_{i}"]))
        for i in range(4)
    ]
    np.testing.assert_array_equal(np.array(found) > 0, [True, False, False, True])


@pytest.mark.parametrize("patterns", [(), ALTERNATING, ("temporal", "full")])
def test_flops_are_those_of_the_program(patterns):
    how = {"patterns": patterns, "skips": True, "attention_implementation": "xla"}
    model = DiT(**sizes(**how))
    tokens, t, text = inputs(grid=5)
    given = tokens.replace(frames=5), t, text
    params = shapes_of(model, *given)
    program = jax.make_jaxpr(model.apply)({"params": params}, *given)
    tables = jax.make_jaxpr(rope_tables, static_argnums=1)(
        tokens.position, wan_axes_dims(16)
    )
    extra = count_products(tables.jaxpr)
    assert 2 * model.flops(40, 3, frames=5) == count_products(program.jaxpr) - extra


def test_flops_of_patterns_in_time_are_the_pairs_that_are_seen():
    full = DiT(**sizes())
    pairs = full.flops(80, 0) - full.flops(40, 0) * 2  # grows with the square
    for name, share in (("chunk_causal", 17 / 25), ("windowed", 13 / 25)):
        model = DiT(**sizes(patterns=(name,)))
        found = model.flops(80, 0, frames=5) - 2 * model.flops(40, 0, frames=5)
        assert found - pairs * share == pytest.approx(
            full.flops(0, 0) * (share - 1), abs=2 * pairs
        )
    with pytest.raises(
        ValueError, match=r"`frames` \(=0\) of a clip must be at least 1"
    ):
        model.flops(80, 0)


def test_what_does_not_fit_raises():
    tokens, t, text = inputs(grid=5)
    ids = jnp.zeros((2, 40), jnp.int32)
    for fields, given, message in (
        (
            {"patterns": ("spatiall",)},
            {},
            r"`patterns` \(=\('spatiall',\)\) .*: full, spa",
        ),
        ({}, {"frames": 7}, r"`tokens.frames` \(=7\) must divide the 40 tokens"),
        (
            {"patterns": ALTERNATING},
            {"visible": Visible(ids, ids)},
            "`tokens.visible` says",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            shapes_of(DiT(**sizes(**fields)), tokens.replace(**given), t, text)
