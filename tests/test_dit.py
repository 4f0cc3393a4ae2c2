"""The diffusion transformer: packing, noise levels, layer forms, sizes."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from products import count_products
from stacks import stack_layers, unstack_layers

from jvdit.models.attention import mosaic
from jvdit.models.attention.dispatch import rope_tables, wan_axes_dims
from jvdit.models.dit import VARIANTS, DiT
from jvdit.models.layers import timestep_embedding
from jvdit.models.lora import LoRA
from jvdit.shapes import Text, Tokens, Visible

SIZES = {**VARIANTS["tiny"], "in_channels": 6, "out_channels": 6, "text_width": 10}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def clip(tokens, states, seed):
    """Tokens and text of one clip that fills its row."""
    position = jnp.abs(draw(1, tokens, 3, seed=seed + 1)) * 5
    latents = draw(1, tokens, 6, seed=seed)
    return Tokens(latents, position), Text(draw(1, states, 10, seed=seed + 2))


def randomised(params):
    """Redraws every parameter, so that no zero or one hides a mistake."""
    leaves, tree = jax.tree.flatten(params)
    drawn = [
        leaf + 0.2 * draw(*leaf.shape, seed=i).astype(leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


@pytest.fixture(scope="module")
def fresh():
    tokens, text = clip(5, 3, seed=0)
    model = DiT(**SIZES)
    return jax.jit(model.init)(jax.random.key(0), tokens, jnp.ones((1, 1)), text)


@pytest.fixture(scope="module")
def params(fresh):
    return randomised(fresh["params"])


@functools.cache
def forward(effort, **fields):
    model = DiT(**SIZES | fields)

    def run(params, *inputs):
        return model.apply({"params": params}, *inputs)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": effort})


def velocity(params, tokens, t, text, effort=0, **fields):
    return forward(effort, **fields)(params, tokens, t, text)


def packed():
    """Clips of 7 and 5 tokens with 4 and 3 states, and padding, in one row."""
    (a, a_text), (b, b_text) = clip(7, 4, seed=10), clip(5, 3, seed=20)
    (pad, pad_text) = clip(3, 2, seed=30)
    segment = jnp.asarray([[1] * 7 + [2] * 5 + [0] * 3])
    text_segment = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2])
    join = [
        jnp.concatenate(x, axis=1)
        for x in (
            (a.latents, b.latents, pad.latents),
            (a.position, b.position, pad.position),
            (a_text.embeds, b_text.embeds, pad_text.embeds),
        )
    ]
    tokens = Tokens(join[0], join[1], segment, segment)
    return tokens, Text(join[2], text_segment), (a, a_text), (b, b_text)


def test_a_fresh_network_predicts_zero(fresh):
    tokens, text = clip(5, 3, seed=0)
    out = velocity(fresh["params"], tokens, jnp.full((1, 1), 0.3), text)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


def test_a_packed_clip_gets_what_it_gets_alone(params):
    tokens, text, a, b = packed()
    out = velocity(params, tokens, jnp.asarray([[0.0, 0.8, 0.3]]), text)
    alone_a = velocity(params, a[0], jnp.full((1, 1), 0.8), a[1])
    alone_b = velocity(params, b[0], jnp.full((1, 1), 0.3), b[1])
    assert_close(out[:, :7], alone_a)
    assert_close(out[:, 7:12], alone_b)
    assert np.isfinite(out).all()
    assert np.abs(alone_a).max() > 0.5


def test_a_clean_clip_is_clean_beside_a_noisy_one(params):
    tokens, text, a, _ = packed()
    level = jnp.where(tokens.segment == 2, 2, 0)
    out = velocity(
        params, tokens.replace(level=level), jnp.asarray([[0.0, 0.8, 0.3]]), text
    )
    clean = velocity(params, a[0], jnp.zeros((1, 1)), a[1])
    assert_close(out[:, :7], clean)


def test_equal_levels_are_one_level(params):
    tokens, text = clip(5, 3, seed=40)
    one = velocity(params, tokens, jnp.full((1, 1), 0.4), text)
    each = tokens.replace(level=jnp.asarray([[0, 1, 2, 1, 0]]))
    many = velocity(params, each, jnp.full((1, 3), 0.4), text)
    assert_close(many, one)
    other = velocity(params, each, jnp.asarray([[0.4, 0.4, 0.6]]), text)
    assert np.abs(other - one).max() > 1e-3


def test_a_level_that_no_token_is_at_changes_nothing(params):
    tokens, text = clip(5, 3, seed=40)
    each = tokens.replace(level=jnp.asarray([[0, 1, 0, 1, 1]]))
    # As users have it, unlike the rest of the suite: the last bits are compared.
    run = functools.partial(velocity, params, each, text=text, effort=3)
    some = run(jnp.asarray([[0.1, 0.5, 0.9]]))
    same = run(jnp.asarray([[0.1, 0.5, 0.2]]))
    np.testing.assert_array_equal(some, same)


def test_the_order_of_tokens_is_only_in_their_positions(params):
    tokens, text, *_ = packed()
    t = jnp.asarray([[0.0, 0.8, 0.3]])
    order = np.random.default_rng(0).permutation(15)
    shuffled = jax.tree.map(lambda x: x[:, order], tokens)
    out = velocity(params, tokens, t, text)
    assert_close(velocity(params, shuffled, t, text), out[:, order])
    moved = tokens.replace(position=tokens.position[:, ::-1])
    assert np.abs(velocity(params, moved, t, text) - out).max() > 1e-3


def test_text_segments_alone_hide_the_padding(params):
    tokens, text = clip(5, 3, seed=40)
    t = jnp.full((1, 1), 0.4)
    padded = Text(
        jnp.concatenate([text.embeds, draw(1, 2, 10, seed=9)], axis=1),
        jnp.asarray([[1, 1, 1, 0, 0]]),
    )
    plain = velocity(params, tokens, t, text)
    assert_close(velocity(params, tokens, t, padded), plain)


def test_no_gradient_crosses_segments(params):
    tokens, text, *_ = packed()
    model = DiT(**SIZES)

    @jax.jit
    def first_clip(latents, embeds, t):
        inputs = tokens.replace(latents=latents), t, text.replace(embeds=embeds)
        return jnp.sum(model.apply({"params": params}, *inputs)[:, :7] ** 2)

    latents, embeds, t = jax.grad(first_clip, argnums=(0, 1, 2))(
        tokens.latents, text.embeds, jnp.asarray([[0.0, 0.8, 0.3]])
    )
    for grad, own in ((latents, 7), (embeds, 4)):
        assert np.abs(grad[:, :own]).min(axis=(0, 2)).max() > 0
        np.testing.assert_array_equal(grad[:, own:], 0)
    np.testing.assert_array_equal(t[0, jnp.asarray([0, 2])], 0)
    assert t[0, 1] != 0


@pytest.mark.parametrize("scan_layers", [False, True])
def test_chunks_see_no_later_ones_of_their_clip(params, scan_layers):
    tokens, text, *_ = packed()
    # Clips of chunks of 4 and 3, of 3 and 2 tokens; a text is of the first id.
    ids = jnp.asarray([[10] * 4 + [11] * 3 + [20] * 3 + [21] * 2 + [0] * 3])
    visible = Visible(ids, ids // 10 * 10, ids)
    tokens = tokens.replace(visible=visible)
    text = text.replace(segment=text.segment * 10)
    given = stack_layers(params) if scan_layers else params
    model = DiT(**SIZES, scan_layers=scan_layers)

    @jax.jit
    def seen(chunk, latents, embeds):
        inputs = tokens.replace(latents=latents), text.replace(embeds=embeds)
        t = jnp.asarray([[0.0, 0.8, 0.3]])
        out = model.apply({"params": given}, inputs[0], t, inputs[1])
        return jnp.sum(jnp.where((ids == chunk)[..., None], out, 0) ** 2)

    for chunk, some, states in (
        (10, [10], [10]),
        (11, [10, 11], [10]),
        (20, [20], [20]),
        (21, [20, 21], [20]),
    ):
        grads = jax.grad(seen, argnums=(1, 2))(chunk, tokens.latents, text.embeds)
        found = [np.abs(x).max(axis=-1) > 0 for x in grads]
        np.testing.assert_array_equal(found[0], np.isin(ids, some))
        np.testing.assert_array_equal(found[1], np.isin(text.segment, states))


def loss_and_gradients(params, **fields):
    tokens, text, *_ = packed()
    inputs = tokens, jnp.asarray([[0.0, 0.8, 0.3]]), text
    model = DiT(**SIZES | fields)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, *inputs) - 1) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def plain(params):
    return loss_and_gradients(params)


@pytest.mark.parametrize(
    "fields",
    [
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "attention", "attention_implementation": "mapped"},
        {"scan_layers": True},
        {"scan_layers": True, "remat": "full"},
        {"attention_implementation": "xla"},
    ],
    ids=str,
)
def test_how_blocks_run_changes_neither_output_nor_gradient(params, plain, fields):
    loss, grads = plain
    if fields.get("scan_layers"):
        other, other_grads = loss_and_gradients(stack_layers(params), **fields)
        other_grads = unstack_layers(other_grads)
    else:
        other, other_grads = loss_and_gradients(params, **fields)
    assert_close(other, loss)
    assert jax.tree.structure(other_grads) == jax.tree.structure(grads)
    assert_close(other_grads, grads)


def test_what_is_kept_is_not_computed_again(params):
    tokens, text, *_ = packed()

    def products(remat):
        fields = {"depth": 1, "remat": remat, "attention_implementation": "mapped"}
        model = DiT(**SIZES | fields)

        def loss(params):
            t = jnp.asarray([[0.0, 0.8, 0.3]])
            return jnp.mean(model.apply({"params": params}, tokens, t, text) ** 2)

        return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

    counts = [products(x) for x in ("none", "attention", "full")]
    assert counts == sorted(set(counts))


def test_derivatives_by_the_modulation_are_those_of_differences(params, plain):
    tokens, text, *_ = packed()
    t = jnp.asarray([[0.0, 0.8, 0.3]])
    model = DiT(**SIZES)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, tokens, t, text) - 1) ** 2)

    # Its read by level has a derivative of its own. Along the gradient the slope is
    # the squared length of the gradient.
    direction = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "table" in str(path) else jnp.zeros_like(x), plain[1]
    )
    slope = sum(jnp.vdot(x, x) for x in jax.tree.leaves(direction))
    _, forward_slope = jax.jit(lambda p: jax.jvp(loss, (p,), (direction,)))(params)
    np.testing.assert_allclose(forward_slope, slope, rtol=1e-4)
    step = 1e-2 / np.sqrt(slope)
    ahead, behind = (
        jax.tree.map(lambda x, d, s=s: x + s * d, params, direction)
        for s in (step, -step)
    )
    difference = (jax.jit(loss)(ahead) - jax.jit(loss)(behind)) / (2 * step)
    np.testing.assert_allclose(difference, slope, rtol=1e-2)


def test_stacked_parameters_are_those_that_scan_layers_makes(fresh):
    tokens, text = clip(5, 3, seed=0)
    model = DiT(**SIZES, scan_layers=True)
    inputs = tokens, jnp.ones((1, 1)), text
    scanned = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    stacked = jax.eval_shape(stack_layers, fresh["params"])
    assert jax.tree.structure(stacked) == jax.tree.structure(scanned)
    assert jax.tree.leaves(stacked) == jax.tree.leaves(scanned)


def test_bfloat16_follows_float32(params):
    tokens, text, *_ = packed()
    t = jnp.asarray([[0.0, 0.8, 0.3]])
    full = velocity(params, tokens, t, text)
    half = velocity(params, tokens, t, text, dtype="bfloat16")
    assert half.dtype == jnp.float32
    error = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-5 < error < 0.05


def test_position_scale_multiplies_the_positions(params):
    tokens, text = clip(5, 3, seed=40)
    t = jnp.full((1, 1), 0.4)
    scaled = velocity(params, tokens, t, text, position_scale=(8.0, 1.0, 0.5))
    unit = jnp.asarray([8.0, 1.0, 0.5])[None, None]
    moved = tokens.replace(position=tokens.position * unit)
    assert_close(scaled, velocity(params, moved, t, text))


def test_timestep_embedding_is_cosines_then_sines():
    out = timestep_embedding(jnp.asarray([[0.0, 700.0]]), 8)
    angle = 700.0 * 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_array_equal(out[0, 0], [1] * 4 + [0] * 4)
    np.testing.assert_allclose(
        out[0, 1], np.concatenate([np.cos(angle), np.sin(angle)]), atol=1e-4
    )
    with pytest.raises(ValueError, match=r"\(=7\) must be even; try 8"):
        timestep_embedding(jnp.ones(3), 7)


def test_flops_are_those_of_the_program():
    tokens, text = clip(9, 4, seed=0)
    model = DiT(**SIZES, attention_implementation="xla")
    t = jnp.ones((1, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens, t, text)
    program = jax.make_jaxpr(model.apply)(params, tokens, t, text)
    tables = jax.make_jaxpr(rope_tables, static_argnums=1)(
        tokens.position, wan_axes_dims(16)
    )
    extra = count_products(tables.jaxpr)
    assert model.flops(9, 4) == count_products(program.jaxpr) - extra


@pytest.mark.parametrize("trained", ["weights", "adapters"])
def test_flops_of_training_are_those_of_its_program(trained):
    sizes = SIZES | {"depth": 4, "width": 128, "ffn_width": 256}
    model = DiT(**sizes, attention_implementation="xla")
    tokens, text = clip(800, 3, seed=0)
    inputs = tokens, jnp.ones((1, 1)), text
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    few = LoRA(rank=1, targets=("self_attention/query$",))
    adapters = jax.eval_shape(few.init, jax.random.key(0), params["params"])
    given = {"weights": params, "adapters": {"lora": adapters}}[trained]

    def loss(given, frozen):
        return model.apply({**frozen, **given}, *inputs).sum()

    found = count_products(jax.make_jaxpr(jax.grad(loss))(given, params).jaxpr)
    # What is at the ends of the network needs fewer gradients: of four layers much.
    assert model.flops(800, 3, trained) == pytest.approx(found, rel=0.08)


def test_wan_14b_at_720p_takes_its_published_flops():
    model = DiT(**VARIANTS["wan2.1-t2v-14b"])
    assert model.flops(21 * 45 * 80, 512) == pytest.approx(6.52e15, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, r"`width` \(=32\) must be divisible by `num_heads` \(=3\)"),
        ({"rope_dims": (4, 4, 4)}, r"`rope_dims` .* must sum .* \(=16\)"),
        ({"rope_dims": (4, 12)}, "3 even numbers"),
        ({"remat": "some"}, "`remat` .*: none, full, dots"),
        ({"in_channels": 4}, "tokens have 6 channels but `in_channels` is 4"),
        ({"attention_implementation": "fast"}, "'fast'"),
    ],
)
def test_fields_that_do_not_fit_raise(fields, message):
    tokens, text = clip(5, 3, seed=0)
    model = DiT(**SIZES | fields)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), tokens, jnp.ones((1, 1)), text)


@pytest.mark.parametrize(
    ("width", "heads", "told"),
    [
        (1536, 24, r"heads of 64 channels.*`num_heads` \(=24\) could be 12"),
        (192, 4, r"heads of 48 channels.*`width` \(=192\) must be a multiple of 128"),
        (1536, 12, ""),
    ],
)
def test_heads_that_a_tpu_is_slow_at_are_told(width, heads, told, caplog, monkeypatch):
    monkeypatch.setattr(mosaic, "_warn", logging.warning)

    def build(tokens):
        tokens, text = clip(tokens, 3, seed=0)
        model = DiT(**SIZES | {"width": width, "num_heads": heads, "depth": 1})
        inputs = tokens, jnp.ones((1, 1)), text
        jax.eval_shape(model.init, jax.random.key(0), *inputs)

    build(200)
    assert not caplog.messages, "processors have another form"
    monkeypatch.setattr(mosaic, "platform", lambda: "tpu")
    build(100)
    assert not caplog.messages, "so few tokens cost little"
    build(200)
    assert len(caplog.messages) == bool(told)
    assert re.search(told, "".join(caplog.messages))


def test_levels_without_a_choice_raise(params):
    tokens, text = clip(5, 3, seed=0)
    with pytest.raises(ValueError, match="3 levels .* but `tokens.level` is None"):
        velocity(params, tokens, jnp.ones((1, 3)), text)
