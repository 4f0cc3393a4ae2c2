"""Error handling of the commands: a user's mistake is reported in one line."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging

# Errors that settings, files or machines cause, not the program.
MISTAKES = (ValueError, OSError, FloatingPointError)


@contextlib.contextmanager
def told_in_a_line(stopped: str) -> Iterator[None]:
    """Exits with one line instead of a traceback on errors in `MISTAKES`.

    With --verbosity the traceback is shown.

    Args:
        stopped: the line to exit with after Ctrl-C.
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
    """Exits with a message if there are command-line arguments besides flags."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; see --help")
