"""How programs are compiled: kept for the next start, with options for the chip."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import jax

# XLA's options by what the chip's `device_kind` contains, first match wins.
OPTIONS: Mapping[str, Mapping[str, str]] = {}


def compiler_options(given: Sequence[str] = ()) -> dict[str, str] | None:
    """XLA's options for a program that is traced now: those of the chip, then others.

    Args:
        given: "NAME=VALUE" each; they win.

    Returns:
        For `jax.jit`; None: there are none.

    Raises:
        ValueError: an option isn't written so.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    kind = described.device_kind if described else jax.devices()[0].device_kind
    options = dict(next((x for name, x in OPTIONS.items() if name in kind), {}))
    for text in given:
        name, equals, value = text.partition("=")
        if not (name.startswith("xla") and equals and value):
            raise ValueError(
                f"option {text!r} must be written NAME=VALUE with a name of XLA's, "
                "such as xla_tpu_enable_async_all_to_all=true."
            )
        options[name] = value
    return options or None


def keep_compilations() -> None:
    """Keeps compiled programs on disk, so that the next start takes them from there.

    On a TPU or GPU, where a large model compiles for minutes; programs of a processor
    might meet another one there. A folder that JAX was told stays (it is
    JAX_COMPILATION_CACHE_DIR), as does the rule that only what took a second is kept.
    """
    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if told or jax.default_backend() == "cpu":
        return
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "jvdit" / "compiled"))
