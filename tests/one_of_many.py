"""`jvdit.train` as one of several processes on CPUs, each with its own kept programs.

JAX lets the first process write what all read. Programs of CPUs are another's to every
process, so here each writes.
"""

import runpy
from unittest import mock

from jax._src import compiler, distributed

_write = compiler._cache_write


def _each_writes(*args):
    with mock.patch.object(distributed.global_state, "process_id", 0):
        _write(*args)


compiler._cache_write = _each_writes
runpy.run_module("jvdit.train", run_name="__main__", alter_sys=True)
