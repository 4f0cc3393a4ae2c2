"""How programs are compiled: kept for the next start, with options for the chip."""

import functools
import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core

from jvdit.machine.chips import this_chip

_WORTH = 0.05  # seconds of compiling for a processor from which a program is kept
# What tells processors apart by their instructions, on x86 and ARM.
_INSTRUCTIONS = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU")


def compiler_options(given: Sequence[str] = ()) -> dict[str, str] | None:
    """XLA's options for a program that is traced now: those of the chip, then others.

    Args:
        given: "NAME=VALUE" each; they win.

    Returns:
        For `jax.jit`; None: there are none.

    Raises:
        ValueError: an option isn't written so.
    """
    chip = this_chip()
    options = dict(chip.options)
    if chip.kind == "cpu" and not _suits_processor(tuple(options.items())):
        options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name.startswith("xla") and equals and value):
            raise ValueError(
                f"option {text!r} must be written NAME=VALUE with a name of XLA's, "
                "such as xla_tpu_scoped_vmem_limit_kib=65536."
            )
        options[name] = value
    return options or None


def _suits_processor(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether options of a processor are for the products that are asked for now.

    In bfloat16 YNNPACK has the better ones.
    """
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return asked != "bfloat16" and _known(options)


@functools.cache
def _known(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether this XLA has these options, all of them, for a processor."""
    program = jax.jit(lambda: 0, compiler_options=dict(options))
    try:
        program.lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


class jit:
    """`jax.jit` with the options of the chip that a program is compiled for.

    They are looked up at a call, not where a function is defined. Within another
    program a function is part of that.

    Args:
        function: what to compile.
        settings: of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any):
        functools.update_wrapper(self, function)
        self._programs: dict[Any, Any] = {}
        self._function, self._settings = function, settings

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs the program, which is compiled at its first call."""
        leaves = jax.tree.leaves((args, named))
        within = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return self._program(None if within else compiler_options())(*args, **named)

    def lower(self, *args: Any, **named: Any) -> Any:
        """The program of a call, to be compiled for its own sake."""
        return self._program(compiler_options()).lower(*args, **named)

    def _program(self, options: dict[str, str] | None) -> Any:
        key = options and tuple(options.items())
        if key not in self._programs:
            self._programs[key] = jax.jit(
                self._function, compiler_options=options, **self._settings
            )
        return self._programs[key]


def keep_compilations(shared: str = "") -> None:
    """Keeps compiled programs on disk, so that the next start takes them from there.

    A large model compiles for minutes, and the small one in the box for most of the
    time of its first clip. Programs of a processor lie in a folder for processors of
    its kind alone, for others might not know its instructions. A folder that JAX was
    told stays (it is JAX_COMPILATION_CACHE_DIR), as does its rule of what is kept.

    Args:
        shared: a folder that all processes see, for programs of several: the first of
            them writes for all, so in a home of their own the others find none.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    if jax.process_count() > 1 and shared:
        folder = pathlib.Path(shared)
    else:
        home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        folder = pathlib.Path(home).expanduser() / "jvdit"
    folder /= "compiled"
    if jax.default_backend() == "cpu":
        folder /= _processor()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A name for the processors that know the same instructions."""
    told, file = [platform.machine()], pathlib.Path("/proc/cpuinfo")
    if file.exists():
        first = file.read_text().partition("\n\n")[0].splitlines()
        told += [line for line in first if line.startswith(_INSTRUCTIONS)]
    return "cpu-" + hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
