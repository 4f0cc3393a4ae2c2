"""What all commands have in common: a mistake of the user's is told in one line."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging

# What is the fault of settings, files or machines.
MISTAKES = (ValueError, OSError, FloatingPointError)


@contextlib.contextmanager
def told_in_a_line(stopped: str) -> Iterator[None]:
    """Ends the process with a line in the place of a traceback.

    Args:
        stopped: the line for somebody who pressed Ctrl-C.
    """
    chosen = flags.FLAGS["verbosity"].present
    if not chosen:
        logging.set_verbosity(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(stopped)
    except MISTAKES as error:
        if chosen:
            raise
        sys.exit(f"error: {error}")


def refuse_arguments(argv: list[str]) -> None:
    """Exits if there are arguments besides flags."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; see --help")
