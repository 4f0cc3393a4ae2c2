"""Trains what a config describes: `python -m jvdit.train --config … --workdir …`.

Killed at any moment and started again with the same command, a run goes on from its
newest checkpoint and ends with the same bits as one that was never stopped.
"""

from jvdit.machine.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # begins this process anew, so before what takes seconds


import sys

import jax
from absl import flags, logging
from ml_collections import config_flags

from jvdit.machine import cluster, flag_parser
from jvdit.machine.command import told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.tasks.stages import run

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Python file with get_config(): one of configs/, or your own.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that is there goes on."
)
_connect = cluster.define_flags()
flags.adopt_module_key_flags(cluster)
_EXIT_STOPPED = flags.DEFINE_integer(
    "exit_stopped",
    0,
    "Exit code if the run was asked to stop, and did: for a launcher.",
)


def main(argv: list[str]) -> None:
    """Parses, runs, and turns mistakes of the user into one line."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; settings are --config.NAME=VALUE")
    if not flags.FLAGS["verbosity"].present:
        # What goes wrong in a thread of orbax's is raised, too, and told in a line.
        logging.get_absl_handler().addFilter(
            lambda record: not (record.exc_info and "orbax" in record.pathname)
        )
    with told_in_a_line("stopped"):
        try:
            _connect()
            keep_compilations(_WORKDIR.value)
            if jax.default_backend() == "tpu":
                cluster.heed_notices()
            finished = run(_CONFIG.value, _WORKDIR.value)
        except KeyboardInterrupt:  # before the first step, or while encoding
            print("stopped; the same command goes on")
            finished = False
    if not finished:
        sys.exit(_EXIT_STOPPED.value)


if __name__ == "__main__":
    flag_parser.run(main, "config", "workdir")
