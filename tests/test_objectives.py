"""The loss of the DiT, and that training and sampling are one step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close

from jvdit.diffusion.denoise import denoise
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models import dit, text_encoder
from jvdit.models.dit import DiT
from jvdit.models.text_encoder import TextEncoder
from jvdit.shapes import Text, Tokens
from jvdit.sharding import batch_sharding, make_mesh
from jvdit.training.objectives.denoising import (
    FlowObjective,
    clip_sizes,
    text_of,
)
from jvdit.training.optim import Optim
from jvdit.training.state import new_state, state_shardings
from jvdit.training.step import jit_train_step

CHANNELS, WORDS = 4, 40


@pytest.fixture(scope="module")
def objective():
    shallow = {"depth": 1}
    text = TextEncoder(**text_encoder.VARIANTS["tiny"] | shallow, vocab_size=WORDS)
    network = DiT(
        **dit.VARIANTS["tiny"] | shallow,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_width=text.width,
    )
    return FlowObjective(network, text, NoisePath(), TimestepPolicy())


@pytest.fixture(scope="module")
def batch():
    """Eight rows of two clips and padding."""
    rng = np.random.default_rng(0)
    segment = np.repeat([[1] * 4 + [2] * 5 + [0] * 3], 8, 0)
    text_segment = np.repeat([[1] * 3 + [2] * 4 + [0]], 8, 0)
    batch = {
        "latents": rng.normal(size=(8, 12, CHANNELS)).astype(np.float32),
        "logvar": np.full((8, 12, CHANNELS), -2.0, np.float32),
        "position": rng.normal(size=(8, 12, 3)).astype(np.float32),
        "segment": segment.astype(np.int32),
        "level": segment.astype(np.int32),
        "text_ids": rng.integers(1, WORDS, (8, 8)).astype(np.int32),
        "text_segment": text_segment.astype(np.int32),
        "valid": np.ones((8, 2), bool),
    }
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.fixture(scope="module")
def params(objective, batch):
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    # The head starts at zero and would hide everything behind it.
    head = params["dit"]["head"]
    head["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), head["kernel"].shape)
    return params


def test_clip_sizes(batch):
    np.testing.assert_array_equal(clip_sizes(batch), [[4, 5]] * 8)


def test_training_and_sampling_share_one_step(objective, params, batch):
    """The loss is the error of `denoise`: same tokens, same shardings."""
    mesh = make_mesh({"data": 4, "fsdp": 2})
    keys = jax.random.split(jax.random.key(2), 2)
    x0 = batch["latents"]
    noise = jax.random.normal(keys[0], x0.shape)
    t = jax.random.uniform(keys[1], (8, 2))
    placed = jax.device_put(
        {**batch, "x0": x0, "noise": noise, "t": t}, batch_sharding(mesh)
    )
    with jax.set_mesh(mesh):
        error, _ = jax.jit(objective.error)(
            params, placed, placed["x0"], placed["noise"], placed["t"]
        )

        def sampled(params, batch):
            levels = jnp.pad(batch["t"], ((0, 0), (1, 0)))
            tokens = Tokens.of(batch, batch["x0"])
            t = tokens.per_token(levels)
            tokens = tokens.with_latents(
                NoisePath().mix(batch["x0"], batch["noise"], t)
            )
            model = partial(objective.dit.apply, {"params": params["dit"]})
            text = text_of(objective.text_encoder, params, batch)
            return denoise(model, tokens, levels, text, NoisePath())

        velocity = jax.jit(sampled)(params, placed)
    wanted = ((velocity - (noise - x0)) ** 2).mean(-1) * (batch["segment"] > 0)
    assert_close(error, wanted)


def test_padding_and_other_clips_do_not_count(objective, params, batch):
    """What stands in padding, or in another clip, changes no loss of a clip."""
    noise = jax.random.normal(jax.random.key(3), batch["latents"].shape)
    t = jnp.full((8, 2), 0.4)
    run = jax.jit(objective.error)
    before, _ = run(params, batch, batch["latents"], noise, t)
    other = (batch["segment"] != 1)[..., None]
    changed = jnp.where(other, batch["latents"] + 3.0, batch["latents"])
    after, _ = run(params, batch, changed, noise, t.at[:, 1].set(0.9))
    assert_close(before[:, :4], after[:, :4])
    assert jnp.abs(before[:, 4:9] - after[:, 4:9]).min() > 1e-4
    np.testing.assert_array_equal(after[:, 9:], 0)


@pytest.fixture(scope="module")
def framed(batch):
    """The same rows, of whose second clip 3 of 5 tokens are given."""
    level = np.array(batch["level"])
    level[:, 4:7] = 0
    return {**batch, "level": jnp.asarray(level)}


def test_what_is_given_is_clean_and_costs_nothing(objective, params, framed):
    """No noise reaches it, the others see it, and it has no part in the loss."""
    given = dataclasses.replace(objective, given=("first_frame",))
    prepared = given.prepare(framed, jax.random.key(0))
    assert given.weight(prepared) == 8 * (4 + 2)
    x0, keys = framed["latents"], jax.random.split(jax.random.key(3))
    noises = [jax.random.normal(key, x0.shape) for key in keys]
    clean = (prepared["level"] == 0)[..., None]
    noises[1] = jnp.where(clean, noises[1], noises[0])
    t = jnp.full((8, 2), 0.4)
    run = jax.jit(given.error)
    first, levels = run(params, prepared, x0, noises[0], t)
    np.testing.assert_array_equal(first, run(params, prepared, x0, noises[1], t)[0])
    np.testing.assert_array_equal(first[:, 4:7], 0)
    np.testing.assert_allclose(levels[0, :9], [0.4] * 4 + [0] * 3 + [0.4] * 2)
    moved, _ = run(params, prepared, x0 + clean, noises[0], t)
    assert jnp.abs(moved - first)[:, 7:9].min() > 1e-5
    assert_close(moved[:, :4], first[:, :4])


def test_a_row_of_one_clip_needs_no_mask_for_what_is_given(objective, params, framed):
    """The same loss, with segments and without."""
    alone = {name: value[:, 4:9] for name, value in framed.items() if name[0] in "lp"}
    alone["segment"] = jnp.ones((8, 5), jnp.int32)
    alone["level"] = alone["segment"].at[:4, :3].set(0)
    alone |= {"text_ids": framed["text_ids"][:, 3:7], "valid": jnp.ones((8, 1), bool)}
    alone["text_segment"] = jnp.ones((8, 4), jnp.int32)
    losses = []
    for one_clip in (False, True):
        made = dataclasses.replace(objective, given=("first_frame",), one_clip=one_clip)
        prepared = made.prepare(alone, jax.random.key(1))
        losses.append(jax.jit(made.loss)(params, prepared)[0])
    assert_close(*losses)


def updated(objective, params, batch, mesh):
    """State and metrics after one update on a mesh."""
    optim = Optim(warmup=0, lr=1e-2, clip=1e9)
    state = new_state(params, optim.optimizer(10))
    places, rows = state_shardings(state, mesh), batch_sharding(mesh)
    with jax.set_mesh(mesh):
        step = jit_train_step(
            objective, optim, 10, seed=0, mesh=mesh, shardings=places, frozen={}
        )
        # The step takes the memory of its state, and `params` are another test's too.
        state = jax.device_put(jax.tree.map(jnp.copy, state), places)
        return step(state, jax.device_put(batch, rows), {})


@pytest.fixture(scope="module")
def on_one_device(objective, params, batch):
    return updated(objective, params, batch, make_mesh({}, jax.devices()[:1]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 4},
        {"data": 2, "context": 4},  # two heads: Ulysses and a ring
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
)
def test_sharded_update_is_that_of_one_device(
    objective, params, batch, on_one_device, sizes
):
    one, one_metrics = on_one_device
    many, metrics = updated(objective, params, batch, make_mesh(sizes))
    for name in ("loss", "gradient_norm"):
        assert_close(metrics[name], one_metrics[name])
    # Adam divides by the gradient's own size, so compare its first moment: (1 - b1) g.
    assert_close(many.opt_state[1][0].mu, one.opt_state[1][0].mu)
    kernel = jax.tree.leaves(many.params["dit"]["block_0"]["mlp"])[-1]
    for axis in ("fsdp", "tensor"):
        assert (axis in str(kernel.sharding.spec)) == (sizes.get(axis, 1) > 1)


def test_validation_is_the_same_every_time(objective, params, batch):
    keys = jax.random.split(jax.random.key(0), 8)
    times = jnp.array([0.1, 0.9])
    run = jax.jit(objective.validate)
    first = run(params, batch, keys, times)
    np.testing.assert_array_equal(first, run(params, batch, keys, times))
    assert first.shape == (2, 1) and first[0] != first[1]


def test_loss_by_noise_level_adds_up(objective, params, batch):
    prepared = objective.prepare(batch, jax.random.key(4))
    loss, metrics = jax.jit(objective.loss)(params, prepared)
    assert_close(sum(s for s, _ in metrics.values()), loss)
    assert sum(n for _, n in metrics.values()) == objective.weight(prepared) == 72


def test_cached_text_embeddings_take_the_encoder_s_place(objective, params, batch):
    states = text_of(objective.text_encoder, params, batch)
    cached = {**batch, "text_embeds": states.embeds}
    found = text_of(None, params, cached)
    assert isinstance(found, Text)
    np.testing.assert_array_equal(found.embeds, states.embeds)


def test_given_tokens_may_be_a_little_noisy(objective, params, batch):
    """The network is told that they are clean, and learns nothing of them."""
    noise = jax.random.normal(jax.random.key(3), batch["latents"].shape)
    t, sigma = jnp.full((8, 2), 0.4), 0.1
    given = np.arange(12) < 2
    batch = batch | {"level": jnp.where(given, 0, batch["level"])}
    noisy = dataclasses.replace(objective, given=("prefix",), given_noise=sigma)
    found, _ = jax.jit(noisy.error)(params, batch, batch["latents"], noise, t)
    plain = dataclasses.replace(noisy, given_noise=0.0)
    mixed = NoisePath().mix(batch["latents"], noise, jnp.asarray(sigma))
    known = jnp.where(given[:, None], mixed, batch["latents"])
    want, _ = jax.jit(plain.error)(params, batch, known, noise, t)
    assert_close(found, want)
    other, _ = jax.jit(plain.error)(params, batch, batch["latents"], noise, t)
    assert jnp.abs(found - other)[:, 2:4].max() > 1e-4
    np.testing.assert_array_equal(np.asarray(found)[:, :2], 0)
