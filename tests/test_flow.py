import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.diffusion.noise_path import SCHEDULES, TARGETS, NoisePath, TimestepPolicy


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return request.param


def pair(key=0):
    keys = jax.random.split(jax.random.key(key), 2)
    return [jax.random.normal(k, (4, 6)) for k in keys]


def test_ends_are_data_and_noise(schedule):
    alpha, sigma = NoisePath(schedule).alpha_sigma(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(alpha[0], 1, atol=1e-6)
    np.testing.assert_allclose(sigma[0], 0, atol=1e-3)
    assert alpha[1] < 0.01 and sigma[1] > 0.99


def test_velocity_is_the_derivative_along_the_clock(schedule):
    path, (x0, noise) = NoisePath(schedule), pair()

    def x_of(t):
        return path.mix(x0, noise, t)

    for t in (0.2, 0.5, 0.9):
        t = jnp.float32(t)
        _, dx = jax.jvp(x_of, (t,), (jnp.float32(1),))
        _, dclock = jax.jvp(path.clock, (t,), (jnp.float32(1),))
        wanted = path.true_velocity(x0, noise, t) * dclock
        np.testing.assert_allclose(dx, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gives_the_velocity_data_and_noise(schedule, target):
    path, (x0, noise) = NoisePath(schedule, target), pair()
    for t in (0.1, 0.5, 0.95):
        t = jnp.float32(t)
        x, velocity = path.mix(x0, noise, t), path.true_velocity(x0, noise, t)
        output = {"velocity": velocity, "noise": noise, "x0": x0}[target]
        np.testing.assert_allclose(path.velocity(output, x, t), velocity, atol=1e-4)
        for got, wanted in zip(path.x0_noise(velocity, x, t), (x0, noise), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_weighted_velocity_error_is_the_error_of_the_target(schedule, target):
    path, (x0, noise) = NoisePath(schedule, target), pair()
    t = jnp.float32(0.6)
    x, velocity = path.mix(x0, noise, t), path.true_velocity(x0, noise, t)
    output = {"velocity": velocity, "noise": noise, "x0": x0}[target]
    wrong = path.velocity(output + 0.1, x, t)
    error = path.loss_weight(t) * jnp.mean((wrong - velocity) ** 2)
    np.testing.assert_allclose(error, 0.01, rtol=1e-3)


def test_shift_grows_with_tokens_inside_its_bounds():
    policy = TimestepPolicy(shift=2.0, shift_tokens=100, shift_range=(1.0, 3.0))
    shifts = policy.shift_for(jnp.array([1.0, 100.0, 169.0, 1e6]))
    np.testing.assert_allclose(shifts, [1.0, 2.0, 2.6, 3.0], rtol=1e-6)


def test_sound_has_later_times():
    """Along with a picture, and by itself, where its own size counts."""
    how = {"shift_tokens": 100, "shift_range": (1.5, 9.0)}
    policy = TimestepPolicy(shift=2.0, sound_shift=3.0, **how)
    even, few, many = jnp.linspace(0, 1, 9), jnp.full(9, 1.0), jnp.full(9, 100.0)
    along = policy.sound_times(policy.shifted(even, many))
    want = TimestepPolicy(shift=6.0).shifted(even, many)
    np.testing.assert_allclose(along, want, rtol=1e-6)
    np.testing.assert_allclose(policy.of_sound.shift_for(few), 4.5)  # 3 x 1.5
    plain = TimestepPolicy(shift=2.0, **how)
    assert plain.of_sound == plain
    np.testing.assert_array_equal(plain.sound_times(even), even)
    with pytest.raises(ValueError, match=r"timesteps\.sound_shift.*=0"):
        TimestepPolicy(sound_shift=0.0)


def test_training_times_follow_the_quantile_and_are_shifted():
    policy = TimestepPolicy(shift=3.0)
    t = policy.sample(jax.random.key(0), jnp.full((64,), 7.0))
    np.testing.assert_allclose(jnp.median(t), 0.75, atol=0.01)  # 3 * .5 / (1 + 2 * .5)
    # Stratified: far closer to the distribution than independent draws would be.
    shares = (jnp.arange(64) + 0.5) / 64
    wanted = policy.quantile(shares, jnp.full((64,), 7.0))
    assert jnp.abs(jnp.sort(t) - wanted).mean() < 0.008
    assert (jnp.diff(t) > 0).any() and (jnp.diff(t) < 0).any()  # in random order


def test_times_fall_from_one_to_zero_for_each_clip():
    policy = TimestepPolicy(shift=2.0, shift_tokens=16)
    times = policy.times(5, jnp.array([[16.0, 64.0]]))
    assert times.shape == (6, 1, 2)
    np.testing.assert_allclose(times[0], 1)
    np.testing.assert_allclose(times[-1], 0)
    assert (jnp.diff(times, axis=0) < 0).all()
    assert (times[1:-1, 0, 1] > times[1:-1, 0, 0]).all()


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="schedule.*'flw'"):
        NoisePath("flw")
    with pytest.raises(ValueError, match="target.*'eps'"):
        NoisePath(target="eps")
    with pytest.raises(ValueError, match="shift.*20"):
        TimestepPolicy(shift=20.0)
    with pytest.raises(ValueError, match="steps.*0"):
        TimestepPolicy().times(0, jnp.ones(1))


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_a_span_takes_its_part_of_the_distribution(distribution):
    policy = TimestepPolicy(distribution, shift=5.0)
    part = dataclasses.replace(policy, span=(0.3, 0.875))
    u = jnp.linspace(0.0, 1.0, 20001)
    count = jnp.ones_like(u)
    whole = np.asarray(policy.quantile(u, count))
    inside = whole[(whole > 0.3) & (whole < 0.875)]
    found = np.asarray(part.quantile(u, count))
    assert found.min() >= 0.3 - 1e-4 and found.max() <= 0.875 + 1e-4
    shares = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(found, shares), np.quantile(inside, shares), atol=2e-3
    )
    with pytest.raises(ValueError, match="`span`"):
        TimestepPolicy(span=(0.5, 0.5))


def test_times_of_wan_begin_below_one_and_end_in_a_leap():
    policy = TimestepPolicy(shift=5.0, shift_range=(0.1, 20.0), grid=(1 - 1e-6, 0.001))
    times = np.asarray(policy.times(4, jnp.ones(1)))[:, 0]
    plain = np.linspace(1, 0.001, 5)[:-1]
    want = 5 * plain / (1 + 4 * plain)
    np.testing.assert_allclose(times[1:-1], want[1:], rtol=1e-6)
    assert times[0] < 1 and times[-1] == 0
    shown = np.asarray(NoisePath(timesteps=1000).shown(jnp.asarray(times)))
    np.testing.assert_allclose(1000 * shown, [999, 937, 833, 625, 0], atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 8.0, 12.0])
def test_the_timestep_shown_is_that_of_the_exact_time(shift):
    """In float32 too, inside jit as outside; exact times are Wan's, in float64."""
    path = NoisePath(timesteps=1000)
    policy = TimestepPolicy(shift=shift, grid=(1 - 1e-6, 0.001))
    wanted, times = [], []
    for steps in range(1, 1001):
        t = np.linspace(1, 0.001, steps + 1)[:-1]
        t = np.minimum(shift * t / (1 + (shift - 1) * t), 1 - 1e-6)
        wanted.append((1000 * t).astype(int))
        times.append(np.asarray(policy.times(steps, jnp.ones(()), 1000))[:-1])
        np.testing.assert_allclose(times[-1], t, rtol=3e-7)  # ulps, to either side
    times = np.concatenate(times)
    for shown in (path.shown(times), jax.jit(path.shown)(times)):
        shown = np.asarray(shown, np.float64)
        assert np.array_equal(np.round(shown * 1000), np.concatenate(wanted))
        np.testing.assert_allclose(shown * 1000, np.round(shown * 1000), rtol=2e-7)


def test_a_grid_may_begin_later_and_reach_its_end():
    count = jnp.ones(())
    policy = TimestepPolicy(grid=(1.0, 0.25), reach_end=True)
    np.testing.assert_allclose(policy.times(4, count), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(policy.times(1, count), [1, 0])
    policy = TimestepPolicy(start=0.75)
    np.testing.assert_allclose(policy.times(3, count), [0.75, 0.5, 0.25, 0])
