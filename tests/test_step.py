"""The update: the same in parts, harmless when not finite, averaged as it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_close

from jvdit.training.optim import Optim
from jvdit.training.state import new_state
from jvdit.training.step import make_train_step


class Line:
    """Fits y = w x, each row weighing as much as it says, with noise drawn by row."""

    def init(self, key, batch):
        return {"layer": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}

    def prepare(self, batch, key):
        return {**batch, "key": jax.random.split(key, len(batch["x"]))}

    def weight(self, batch):
        return batch["weight"].sum()

    def loss(self, params, batch, *, ema, step):
        noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(batch["key"])
        layer = params["layer"]
        found = (batch["x"] + 0.1 * noise) @ layer["kernel"] + layer["bias"][None]
        error = jnp.sum((found - batch["y"]) ** 2, axis=1) * batch["weight"]
        big = batch["weight"] > 1
        return error.sum(), {
            "error": error.sum(),
            "error_of_big": (jnp.where(big, error, 0.0).sum(), big.sum() * 1.0),
        }


def batch_of(seed, rows=8):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    weight = rng.integers(0, 4, rows).astype(np.float32)
    batch = {"x": x, "y": x[:, :2] * 2 + 1, "weight": weight}
    return {name: jnp.asarray(value) for name, value in batch.items()}


def run(optim, batches, steps=100):
    line = Line()
    state = new_state(line.init(None, None), optim.optimizer(steps))
    step = jax.jit(make_train_step(line, optim, steps, seed=3))
    history = []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, history


def kernel(state):
    return np.asarray(state.params["layer"]["kernel"])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_update_is_that_of_the_whole_batch(parts):
    batches = [batch_of(i) for i in range(3)]
    whole, history = run(Optim(warmup=0, lr=0.1), batches)
    taken, in_parts = run(Optim(warmup=0, lr=0.1, accumulate=parts), batches)
    assert_close(kernel(taken), kernel(whole))
    for name in ("loss", "error", "error_of_big", "gradient_norm"):
        assert_close(in_parts[-1][name], history[-1][name])


def test_rows_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="8.*accumulate.*3.*9 rows"):
        run(Optim(accumulate=3), [batch_of(0)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_its_count(value):
    good, bad = batch_of(0), batch_of(1)
    bad["y"] = jnp.where(bad["weight"][:, None] > 0, value, bad["y"])
    optim = Optim(warmup=0, lr=0.1)
    before, _ = run(optim, [good])
    after, history = run(optim, [good, bad, bad])
    for a, b in zip(
        jax.tree.leaves((before.params, before.ema, before.opt_state)),
        jax.tree.leaves((after.params, after.ema, after.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert [int(m["skipped_in_a_row"]) for m in history] == [0, 1, 2]
    assert int(after.step) == 3 and int(after.skipped) == 2
    going_on, _ = run(optim, [good, bad, good])
    assert int(going_on.skipped_in_a_row) == 0 and int(going_on.skipped) == 1
    assert np.abs(kernel(going_on) - kernel(before)).max() > 0


@pytest.mark.parametrize(
    "fault", [{"lr": np.nan}, {"eps": 0.0, "lr": np.inf}, {"b2": 1.0}, {"clip": np.nan}]
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_that_is_not_finite_is_left_out(monkeypatch, fault, name):
    """Whatever the optimizer makes of a good gradient."""
    monkeypatch.setattr("jvdit.training.optim.check_ranges", lambda *_: None)
    state, history = run(Optim(warmup=0, name=name, **fault), [batch_of(0)] * 2)
    kept = state.params, state.ema, state.opt_state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
    assert [int(m["skipped_in_a_row"]) for m in history] == [1, 2]
    assert all(np.isfinite(m["loss"]) for m in history)


def test_randomness_is_of_the_step_and_the_seed():
    first, _ = run(Optim(warmup=0), [batch_of(0)] * 2)
    again, _ = run(Optim(warmup=0), [batch_of(0)] * 2)
    np.testing.assert_array_equal(kernel(first), kernel(again))
    optim = Optim(warmup=0)
    step = make_train_step(Line(), optim, 100, seed=3)
    state = new_state(Line().init(None, None), optim.optimizer(100))
    shifted = state.replace(step=jnp.int32(5))
    _, at_0 = step(state, batch_of(0))
    _, at_5 = step(shifted, batch_of(0))
    # Only the bias moves the loss of zero weights: make the noise count.
    moved = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    _, at_0 = step(state.replace(params=moved), batch_of(0))
    _, at_5 = step(shifted.replace(params=moved), batch_of(0))
    assert at_0["loss"] != at_5["loss"]


def test_average_follows_with_its_decay():
    optim = Optim(warmup=0, lr=0.1, ema=0.5)
    state, _ = run(optim, [batch_of(0)])
    # The first decay is min(0.5, 1 / 10); the weights began at 0.
    average = np.asarray(state.ema["layer"]["kernel"])
    assert_close(average, 0.9 * kernel(state), 16)


def test_gradient_is_clipped_and_only_matrices_decay():
    optim = Optim(warmup=0, lr=0.1, clip=1e-3, weight_decay=0.5)
    optimizer = optim.optimizer(10)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5)
    np.testing.assert_allclose(updates["bias"], 0)
    clipped, _ = optax.clip_by_global_norm(1e-3).update(params, optax.EmptyState())
    assert optax.global_norm(clipped) < 1.01e-3


def test_learning_rate_warms_up_and_decays():
    rate = Optim(lr=1.0, warmup=10, schedule="cosine").learning_rate(110)
    values = [float(rate(i)) for i in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.1, 0.55, 1.0, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    "name, values",
    [
        ("lr", (0.0, -1.0, np.nan, np.inf, 1e-60)),
        ("clip", (0.0, np.nan, np.inf)),
        ("eps", (0.0, np.nan, -1e-8)),
        ("weight_decay", (-0.1, np.nan, np.inf)),
        ("warmup", (-1,)),
        ("accumulate", (0,)),
        ("b1", (1.0, -0.1, np.nan)),
        ("b2", (1.0, np.nan, 1 - 1e-9)),
        ("ema", (1.0, np.nan)),
        ("schedule", ("step",)),
    ],
)
def test_bad_settings_are_named(name, values):
    for value in values:
        told = re.escape(repr(value) if isinstance(value, str) else str(value))
        with pytest.raises(ValueError, match=rf"`optim.{name}` \(={told}\) must "):
            Optim(**{name: value})


class Seen(Line):
    """Fits two layers, and tells what it sees beside the batch."""

    def init(self, key, batch):
        return {
            name: Line.init(self, key, batch)["layer"] for name in ("layer", "other")
        }

    def loss(self, params, batch, *, ema, step):
        loss, _ = Line.loss(self, params, batch, ema=ema, step=step)
        other, _ = Line.loss(
            self, {"layer": params["other"]}, batch, ema=ema, step=step
        )
        told = {"step": step, "ema": ema["layer"]["bias"][0], "frozen": ema["still"]}
        one = jnp.ones(())
        return loss + other, {name: (value * 1.0, one) for name, value in told.items()}


def taken(optim, count=5):
    """The states before and after `count` steps of `Seen`, and what it told."""
    seen = Seen()
    state = new_state(seen.init(None, None), optim.optimizer(10))
    step = jax.jit(make_train_step(seen, optim, 10, seed=3))
    states, told = [state], []
    for i in range(count):
        state, metrics = step(state, batch_of(i), {"still": jnp.asarray(7.0)})
        states.append(state)
        told.append(metrics)
    return states, told


def test_an_objective_sees_the_average_and_the_step():
    states, told = taken(Optim(warmup=0, lr=0.1))
    for i, (state, metrics) in enumerate(zip(states, told, strict=False)):
        assert metrics["step"] == i and metrics["frozen"] == 7
        assert metrics["ema"] == state.ema["layer"]["bias"][0]
    assert told[-1]["ema"] != states[-2].params["layer"]["bias"][0]


def test_a_network_may_have_an_optimizer_of_its_own():
    """Each then moves as it does where all have its optimizer, clipped by itself."""
    common = {"warmup": 0, "clip": 1e-3, "lr": 0.1, "eps": 1e-3}
    own = {"lr": 0.01, "name": "muon", "clip": 2e-3}
    both = Optim(**common, networks={"other": own})
    found = taken(both)[0][-1].params
    # With one optimizer they stay alike: each has half of the square of the norm.
    for name, fields in (("layer", common), ("other", {**common, **own})):
        alike = Optim(**{**fields, "clip": fields["clip"] * 2**0.5})
        want = taken(alike)[0][-1].params[name]["kernel"]
        np.testing.assert_allclose(found[name]["kernel"], want, rtol=1e-5)


def test_optimizers_of_networks_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="networks.critic` has moment"):
        Optim(networks={"critic": {"moment": 1}})
    with pytest.raises(ValueError, match="optim.lr"):
        Optim(networks={"critic": {"lr": -1.0}})
    with pytest.raises(ValueError, match="critic.*this run trains layer, other"):
        taken(Optim(networks={"critic": {"lr": 1e-3}}))
