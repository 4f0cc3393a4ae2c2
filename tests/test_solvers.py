"""Solvers against the exact flow of Gaussian data, whose velocity is closed-form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.diffusion.denoise import Guidance, clip_std, guided
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.diffusion.solvers import (
    SOLVERS,
    advance,
    begin,
    check_solver,
    clip_noise,
)
from jvdit.shapes import Text, Tokens

MEAN, STD = 0.7, 0.4  # of the data


def keys(rows, levels, seed=0):
    return jax.random.split(jax.random.key(seed), (rows, levels))


def solve(denoiser, tokens, times, path, keys, solver="unipc"):
    """All steps: from noise at t = 1 to data at t = 0."""
    start = begin(tokens, times, solver)
    return advance(denoiser, start, times, path, keys, solver).tokens.latents


def gaussian_denoiser(path):
    """The exact velocity for x0 ~ N(MEAN, STD^2)."""

    def denoiser(tokens, t):
        t = tokens.per_token(t)
        alpha, sigma = path.alpha_sigma(t)
        variance = (alpha * STD) ** 2 + sigma**2
        gain = alpha * STD**2 / variance
        x0 = MEAN + gain * (tokens.latents - alpha * MEAN)
        noise = sigma / variance * (tokens.latents - alpha * MEAN)
        return path.true_velocity(x0, noise, t)

    return denoiser


def start(path, seed=0):
    noise = jax.random.normal(jax.random.key(seed), (2, 8, 3))
    tokens = Tokens(noise, jnp.zeros((2, 8, 3)))
    alpha, sigma = path.alpha_sigma(jnp.float32(1.0))
    spread = jnp.sqrt((alpha * STD) ** 2 + sigma**2)
    exact = MEAN + STD * (noise - alpha * MEAN) / spread
    return tokens, exact


def error(solver, steps, path, shift=1.0):
    tokens, exact = start(path)
    times = TimestepPolicy(shift=shift).times(steps, jnp.ones((2, 1)))
    got = solve(gaussian_denoiser(path), tokens, times, path, keys(2, 1), solver)
    return float(jnp.abs(got - exact).max())


@pytest.mark.parametrize(
    "solver, order",
    [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)],
)
def test_order(solver, order):
    coarse, fine = error(solver, 64, NoisePath()), error(solver, 256, NoisePath())
    assert np.log(coarse / fine) / np.log(4) > order - 0.35, (coarse, fine)


@pytest.mark.parametrize("schedule", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "dpmpp_2m", "unipc"])
def test_more_steps_come_closer_on_every_path(solver, schedule):
    path = NoisePath(schedule)
    assert error(solver, 60, path) < min(0.06, 0.6 * error(solver, 15, path))


def test_unipc_beats_dpmpp_in_few_steps():
    assert error("unipc", 10, NoisePath(), 3.0) < error(
        "dpmpp_2m", 10, NoisePath(), 3.0
    )


def test_euler_and_ddim_are_one_on_the_flow_path():
    assert np.isclose(
        error("euler", 7, NoisePath()), error("ddim", 7, NoisePath()), rtol=1e-4
    )


@pytest.mark.parametrize("schedule", ["flow", "linear"])
def test_renoise_ends_at_a_prediction_from_fresh_noise(schedule):
    """Of a network that knows the data exactly: every step begins anew."""
    path, tokens = NoisePath(schedule), start(NoisePath(schedule))[0]
    times = TimestepPolicy(levels=(1.0, 0.6, 0.3)).times(3, jnp.ones((2, 1)))
    x0 = jax.random.normal(jax.random.key(9), tokens.latents.shape)
    seen = []

    def exact(tokens, t):
        level = tokens.per_token(t)
        alpha, sigma = path.alpha_sigma(level)
        noise = (tokens.latents - alpha * x0) / sigma
        jax.debug.callback(lambda noise: seen.append(noise), noise, ordered=True)
        return path.true_velocity(x0, noise, level)

    found = solve(exact, tokens, times, path, keys(2, 1), "renoise")
    jax.effects_barrier()
    np.testing.assert_allclose(found, x0, atol=1e-4)
    for one, other in itertools.combinations(seen, 2):
        np.testing.assert_allclose([x.std() for x in (one, other)], 1, atol=0.25)
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.3


@pytest.mark.parametrize("schedule", ["flow", "linear"])
def test_ancestral_draws_from_the_data(schedule):
    path = NoisePath(schedule)
    noise = jax.random.normal(jax.random.key(0), (1, 4096, 4))
    tokens = Tokens(noise, jnp.zeros((1, 4096, 3)))
    times = TimestepPolicy().times(100, jnp.ones((1, 1)))
    x = solve(gaussian_denoiser(path), tokens, times, path, keys(1, 1, 3), "ancestral")
    np.testing.assert_allclose(x.mean(), MEAN, atol=0.02)
    np.testing.assert_allclose(x.std(), STD, atol=0.04)
    # It draws: x does not follow from the first noise alone.
    again = solve(
        gaussian_denoiser(path), tokens, times, path, keys(1, 1, 4), "ancestral"
    )
    assert jnp.abs(x - again).mean() > 0.1


@pytest.mark.parametrize("solver", [*SOLVERS])
def test_clean_tokens_stay_and_each_level_has_its_own_times(solver):
    """Level 0 stays as given; level 2's shift doesn't disturb level 1."""
    path = NoisePath()
    noise = jax.random.normal(jax.random.key(0), (1, 6, 3))
    level = jnp.array([[0, 0, 1, 1, 2, 2]])
    tokens = Tokens(noise, jnp.zeros((1, 6, 3)), level, level)
    plain = TimestepPolicy().times(12, jnp.ones((1, 3))).at[:, :, 0].set(0)
    shifted = plain.at[:, :, 2].set(TimestepPolicy(shift=4.0).times(12, jnp.ones((1,))))
    key = keys(1, 3)
    a = solve(gaussian_denoiser(path), tokens, plain, path, key, solver)
    b = solve(gaussian_denoiser(path), tokens, shifted, path, key, solver)
    np.testing.assert_array_equal(a[:, :2], noise[:, :2])
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert jnp.isfinite(b).all() and jnp.abs(a[:, 4:] - b[:, 4:]).max() > 1e-6


def test_a_clip_s_noise_is_its_own():
    """The same key gives the same noise alone in a row and packed behind another."""
    both = keys(1, 3)
    level = jnp.array([[1, 1, 2, 2, 2, 0]])
    packed = Tokens(jnp.zeros((1, 6, 4)), jnp.zeros((1, 6, 3)), level, level)
    alone = Tokens(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 3)))
    noise = clip_noise(both, packed)
    np.testing.assert_array_equal(noise[:, 2:5], clip_noise(both[:, 2:], alone))
    assert jnp.abs(noise[0, 0] - noise[0, 2]).max() > 0.1


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_steps_taken_one_by_one_are_those_of_the_whole(solver):
    tokens, _ = start(NoisePath())
    times = TimestepPolicy().times(4, jnp.ones((2, 1)))
    settings = times, NoisePath(), keys(2, 1), solver
    whole = solve(gaussian_denoiser(NoisePath()), tokens, *settings)
    solution = begin(tokens, times, solver)
    one = jax.jit(
        lambda solution, i: advance(
            gaussian_denoiser(NoisePath()), solution, *settings, i, 1
        )
    )
    for i in range(4):
        solution = one(solution, i)
    np.testing.assert_allclose(solution.tokens.latents, whole, atol=1e-5)


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match="'eulr'.*euler"):
        check_solver("eulr")


# Guidance


def text_model(tokens, t, text):
    """Predicts the mean of the text as velocity, whatever the tokens."""
    value = text.embeds.mean((1, 2))[:, None, None]
    return tokens.latents * 0.1 + value


def texts():
    return Text(jnp.full((2, 4, 5), 1.0)), Text(jnp.full((2, 4, 5), 0.25))


def test_guidance_extrapolates_inside_its_interval():
    tokens, _ = start(NoisePath())
    text, null = texts()
    guidance = Guidance(3.0, interval=(0.2, 0.8))
    denoiser = guided(text_model, text, null, NoisePath(), guidance)
    t = jnp.array([[0.5], [0.9]])
    got = denoiser(tokens, t) - 0.1 * tokens.latents
    np.testing.assert_allclose(got[0], 0.25 + 3 * 0.75, rtol=1e-4)
    np.testing.assert_allclose(got[1], 1.0, rtol=1e-4)


def test_control_has_a_scale_of_its_own():
    """Away from what the clip would be without its channels, whatever the text."""
    tokens, _ = start(NoisePath())
    cond = jnp.full((*tokens.latents.shape[:2], 4), 2.0)
    tokens = tokens.replace(cond=cond)
    text, null = texts()

    def model(tokens, t, text):
        return text_model(tokens, t, text) + tokens.cond.mean((1, 2))[:, None, None]

    t = jnp.array([[0.5], [0.9]])
    guidance = Guidance(3.0, interval=(0.2, 0.8), control=4.0)
    assert guidance.evaluations() == 3
    denoiser = guided(model, text, null, NoisePath(), guidance)
    got = denoiser(tokens, t) - 0.1 * tokens.latents
    # Null text and channels, the text's part thrice, and the channels' four times.
    np.testing.assert_allclose(got[0], 0.25 + 3 * 0.75 + 4 * 2.0, rtol=1e-4)
    np.testing.assert_allclose(got[1], 1.0 + 2.0, rtol=1e-4)
    with pytest.raises(ValueError, match="control_guidance_scale.*=-1"):
        Guidance(control=-1.0)


def test_full_rescale_restores_the_std_of_each_clip():
    path = NoisePath()
    noise = jax.random.normal(jax.random.key(0), (2, 6, 3))
    level = jnp.array([[1, 1, 1, 2, 2, 2]] * 2)
    tokens = Tokens(noise, jnp.zeros((2, 6, 3)), level, level)
    t = jnp.full((2, 3), 0.6)

    def model(tokens, t, text):
        return tokens.latents * text.embeds.mean((1, 2))[:, None, None]

    text, null = texts()
    alone = guided(model, text, null, path, Guidance(1.0))(tokens, t)
    full = guided(model, text, null, path, Guidance(4.0, rescale=1.0))(tokens, t)
    std = [
        clip_std(path.x0_noise(v, noise, jnp.float32(0.6))[0], tokens, 3)
        for v in (alone, full)
    ]
    np.testing.assert_allclose(std[0][:, 1:], std[1][:, 1:], rtol=1e-3)


def test_scale_one_evaluates_once():
    tokens, _ = start(NoisePath())
    text, null = texts()
    rows = []

    def model(tokens, t, text):
        rows.append(tokens.latents.shape[0])
        return tokens.latents

    t = jnp.full((2, 1), 0.5)
    guided(model, text, null, NoisePath(), Guidance())(tokens, t)
    guided(model, text, null, NoisePath(), Guidance(2.0))(tokens, t)
    assert rows == [2, 4]


def test_bad_guidance_is_named():
    with pytest.raises(ValueError, match="guidance_scale.*-1"):
        Guidance(-1.0)
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, interval=(0.9, 0.1))
    with pytest.raises(ValueError, match="rescale"):
        Guidance(2.0, rescale=2.0)
