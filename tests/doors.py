"""Commands run in this process: what a user types, without the start of a new one."""

import contextlib
import dataclasses
import importlib
import io
import sys
from unittest import mock

from absl import flags


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command leaves, as `subprocess.run` tells it."""

    returncode: int
    stdout: str
    stderr: str


def command(name, *args):
    """Runs `python -m jvdit.NAME ARGS` without the process."""
    line = [f"jvdit.{name}", *map(str, args)]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with flags_of(line[0]) as main, mock.patch.object(sys, "argv", line):
            try:
                main(flags.FLAGS(line))
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):  # as Python itself does it
                    print(code, file=sys.stderr)
                    code = 1
    return Done(code, out.getvalue(), err.getvalue())


_SHARED = "jvdit.generation.shared_flags"


@contextlib.contextmanager
def flags_of(door):
    """The flags of one command alone, since several have some of one name."""
    held = flags.FLAGS._flags()
    kept = dict(held)
    for name in kept:
        module = flags.FLAGS.find_module_defining_flag(name) or ""
        if module.startswith("jvdit."):
            del held[name]
    try:
        # Those of the module that both adopt are defined but once.
        if door in ("jvdit.sample", "jvdit.serve"):
            importlib.import_module(_SHARED)
            held |= {x.name: x for x in flags.FLAGS.get_flags_for_module(_SHARED)}
        main = importlib.import_module(door).main
        for flag in flags.FLAGS.get_key_flags_for_module(door):
            flag.unparse()
            held[flag.name] = flag
        yield main
    finally:
        held.clear()
        held.update(kept)
        flags.FLAGS.unparse_flags()
