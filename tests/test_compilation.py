"""Options of the compiler, and where compiled programs are kept."""

import platform
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvdit.machine import compilation
from jvdit.machine.chips import CHIPS, Chip
from jvdit.sharding import batch_sharding, make_mesh

CHIP = Chip("cpu", options={"xla_a": "1", "xla_b": "1"})


def test_options_given_win_over_those_of_the_chip(monkeypatch):
    monkeypatch.setattr(compilation, "this_chip", lambda: CHIP)
    monkeypatch.setattr(compilation, "_refusal", lambda options: "")
    made = compilation.compiler_options(["xla_b=2", "xla_d=x=y"])
    assert made == {"xla_a": "1", "xla_b": "2", "xla_d": "x=y"}


def test_a_processor_gets_its_options_for_float32_alone():
    options = compilation.compiler_options()
    assert options == CHIPS["cpu"].options  # this XLA has them
    with jax.default_matmul_precision("bfloat16"):
        assert compilation.compiler_options() is None


def test_options_that_this_xla_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "this_chip", lambda: CHIP)
    assert compilation.compiler_options() is None
    assert compilation.compiler_options(["xla_d=1"]) == {"xla_d": "1"}


def test_a_program_has_the_options_of_the_moment_and_runs_within_others(monkeypatch):
    asked = []
    plain = jax.jit

    def spy(function, **settings):
        asked.append(settings["compiler_options"])
        return plain(function, **settings)

    double = compilation.jit(lambda x, *, times: x * times, static_argnames="times")
    monkeypatch.setattr(compilation.jax, "jit", spy)
    assert double(jnp.ones(()), times=2) == double(jnp.ones(()), times=2) == 2
    assert asked == [CHIPS["cpu"].options]  # compiled once
    # XLA refuses options of a part of a program.
    assert plain(lambda x: double(x, times=3) + 1)(jnp.ones(())) == 4
    assert asked[1:] == [None]
    text = double.lower(jnp.ones(()), times=2).compile().as_text()
    assert "HloModule" in text and len(asked) == 2


@pytest.mark.parametrize("text", ["xla_a", "xla_a=", "fast=true"])
def test_an_option_that_is_none_is_named(text):
    with pytest.raises(ValueError, match=f"{text!r}.*NAME=VALUE"):
        compilation.compiler_options([text])


def test_an_option_that_xla_does_not_take_is_named():
    compilation.check_options(["xla_cpu_enable_fast_math=True"])
    for text in ("xla_nonsense=1", "xla_cpu_enable_fast_math=perhaps"):
        with pytest.raises(ValueError, match=f"compiler_options.*{text}"):
            compilation.check_options([text])


def test_programs_are_kept_where_compiling_takes_long(monkeypatch, tmp_path):
    told, kept = [], jax.config.jax_compilation_cache_dir
    compilation.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == kept  # where JAX was told to
    without = mock.Mock(
        jax_compilation_cache_dir=None, update=lambda *x: told.append(x)
    )
    monkeypatch.setattr(jax, "config", without)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = str(tmp_path / "jvdit/compiled")
    # Another processor might not know the instructions of this one's programs.
    for machine in ("x86_64", "riscv64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        compilation.keep_compilations()
    places = [value for name, value in told if name == "jax_compilation_cache_dir"]
    assert len({*places}) == 2 and all(x.startswith(f"{folder}/cpu-") for x in places)
    told.clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compilation.keep_compilations()
    assert told == [("jax_compilation_cache_dir", folder)]
    # Among hosts one writes: to a folder of its own it would write for itself alone.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation.keep_compilations(str(tmp_path / "run"))
    folder = str(tmp_path / "run/compiled")
    assert told[1:] == [("jax_compilation_cache_dir", folder)]


def test_another_start_loads_its_program_and_no_other(request):
    """Programs are found by source and settings, data in them, types and devices."""
    events, salt = [], np.random.default_rng().uniform()  # of no earlier run
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    least = "jax_persistent_cache_min_compile_time_secs"
    request.addfinalizer(partial(jax.config.update, least, getattr(jax.config, least)))
    jax.config.update(least, 0.0)

    def found(devices=8, dtype=jnp.float32, statistics=1.5, setting=0.25):
        """Whether a program was kept, which is known to nothing but the disk."""
        data = np.full(8, statistics, np.float32)

        def program(x):
            return jnp.sin(x) * data.astype(x.dtype) + jnp.asarray(setting + salt)

        mesh = make_mesh(devices=jax.devices()[:devices])
        x = jax.device_put(jnp.ones(8, dtype), batch_sharding(mesh))
        events.clear()
        jax.jit(program)(x)
        return "/jax/compilation_cache/cache_hits" in events

    assert [found(), found()] == [False, True]
    others = {"setting": 0.5}, {"statistics": 2.5}, {"dtype": jnp.bfloat16}
    for other in (*others, {"devices": 4}):
        assert [found(**other), found(**other), found()] == [False, True, True]
