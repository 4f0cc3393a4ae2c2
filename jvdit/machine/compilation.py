"""Compilation: XLA options for the chip, and a cache of compiled programs."""

import functools
import hashlib
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core

from jvdit.machine.chips import this_chip
from jvdit.machine.files import cache_folder

_WORTH = 0.05  # least seconds of compilation on a CPU for a program to be cached
# Lines of /proc/cpuinfo that identify a CPU's instruction set, on x86 and ARM.
_INSTRUCTIONS = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU")


def compiler_options(given: Sequence[str] = ()) -> dict[str, str] | None:
    """XLA compiler options for a program that is traced now.

    Args:
        given: further options, each "NAME=VALUE", which override those of the chip.

    Returns:
        Options for `jax.jit`; None if there are none.

    Raises:
        ValueError: an option isn't of the form NAME=VALUE.
    """
    chip = this_chip()
    options = dict(chip.options)
    if chip.kind == "cpu":
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        # In bfloat16, YNNPACK is faster than what the options choose.
        if precision == "bfloat16" or _refusal(tuple(options.items())):
            options = {}
    return {**options, **_parsed(given)} or None


def check_options(given: Sequence[str]) -> None:
    """Checks that XLA takes options on the devices of this process.

    Raises:
        ValueError: one isn't of the form NAME=VALUE, or XLA doesn't take it.
    """
    for option in _parsed(given).items():
        if reason := _refusal((option,)):
            raise ValueError(
                f"`compiler_options` has {'='.join(option)!r}, which XLA doesn't take "
                f"here: {reason}"
            )


def _parsed(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name.startswith("xla") and equals and value):
            raise ValueError(
                f"option {text!r} must be written NAME=VALUE with a name of XLA's, "
                "such as xla_tpu_scoped_vmem_limit_kib=65536."
            )
        options[name] = value
    return options


@functools.cache
def _refusal(options: tuple[tuple[str, str], ...]) -> str:
    """Why this version of XLA doesn't take these options; "" if it does."""
    program = jax.jit(lambda: 0, compiler_options=dict(options))
    try:
        program.lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return ""


class jit:
    """`jax.jit` with the XLA options of the chip that a program is compiled for.

    The options are looked up at each call, not where the function is defined. Called
    within another jitted function, it is traced as a part of that, without options.

    Args:
        function: the function to compile.
        settings: further arguments of `jax.jit`.
    """

    def __init__(self, function: Callable[..., Any], **settings: Any):
        functools.update_wrapper(self, function)
        self._programs: dict[Any, Any] = {}
        self._function, self._settings = function, settings

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs the program, compiling it at the first call."""
        leaves = jax.tree.leaves((args, named))
        within = any(isinstance(x, jax.core.Tracer) for x in leaves)
        return self._program(None if within else compiler_options())(*args, **named)

    def lower(self, *args: Any, **named: Any) -> Any:
        """Lowers the program of a call without running it; see `jax.jit`'s `lower`."""
        return self._program(compiler_options()).lower(*args, **named)

    def _program(self, options: dict[str, str] | None) -> Any:
        key = options and tuple(options.items())
        if key not in self._programs:
            self._programs[key] = jax.jit(
                self._function, compiler_options=options, **self._settings
            )
        return self._programs[key]


def keep_compilations(shared: str = "") -> None:
    """Turns on JAX's compilation cache, so that the next start needn't compile.

    A large model compiles for minutes, and the small one that comes with jvdit for most
    of the time of its first clip. The cache is `jvdit/compiled` in the user's cache
    folder (XDG_CACHE_HOME or ~/.cache). CPU programs have a folder for each kind of
    CPU, since others may lack its instructions. If JAX_COMPILATION_CACHE_DIR is set,
    nothing changes.

    Args:
        shared: a folder that all processes of a run see, for the cache of a run with
            several: process 0 alone writes, so separate home folders would stay empty.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    if jax.process_count() > 1 and shared:
        folder = pathlib.Path(shared)
    else:
        folder = cache_folder()
    folder /= "compiled"
    if jax.default_backend() == "cpu":
        folder /= _processor()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A name for the kind of this CPU: equal for CPUs with the same instructions."""
    told, file = [platform.machine()], pathlib.Path("/proc/cpuinfo")
    if file.exists():
        first = file.read_text().partition("\n\n")[0].splitlines()
        told += [line for line in first if line.startswith(_INSTRUCTIONS)]
    return "cpu-" + hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
