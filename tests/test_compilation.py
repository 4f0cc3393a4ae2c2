"""Options of the compiler, and where compiled programs are kept."""

import jax
import pytest

from jvdit import compilation


def test_options_given_win_over_those_of_the_chip(monkeypatch):
    assert compilation.compiler_options() is None
    table = {"cpu": {"xla_a": "1", "xla_b": "1"}, "TPU": {"xla_c": "1"}}
    monkeypatch.setattr(compilation, "OPTIONS", table)
    made = compilation.compiler_options(["xla_b=2", "xla_d=x=y"])
    assert made == {"xla_a": "1", "xla_b": "2", "xla_d": "x=y"}


@pytest.mark.parametrize("text", ["xla_a", "xla_a=", "fast=true"])
def test_an_option_that_is_none_is_named(text):
    with pytest.raises(ValueError, match=f"{text!r}.*NAME=VALUE"):
        compilation.compiler_options([text])


def test_programs_are_kept_where_compiling_takes_long(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(jax.config, "update", lambda *x: told.append(x))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation.keep_compilations()
    assert not told  # on a processor
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compilation.keep_compilations()
    folder = str(tmp_path / "jvdit/compiled")
    assert told == [("jax_compilation_cache_dir", folder)]
