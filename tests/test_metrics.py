"""What a run tells of itself."""

import os
import pathlib
import threading

import jax.numpy as jnp
import pytest

from jvdit.training.checkpoint import Checkpoints
from jvdit.training.metrics import Metrics

FILES = pathlib.Path("/proc/self/fd")


@pytest.mark.skipif(not FILES.exists(), reason="only Linux lists open files there")
def test_what_a_long_run_holds_open_does_not_grow(tmp_path):
    """While a checkpoint is written orbax has ten more files, and they are closed."""
    counts = []
    checkpoints = Checkpoints(tmp_path, keep=2)
    with Metrics(tmp_path, 8, 0, "flow") as metrics:
        for step in range(8):
            checkpoints.save(step, {"x": jnp.zeros(3)}, {"step": step})
            checkpoints.wait()
            metrics.scalars(step, {"loss": 1.0})
            metrics.flush()
            counts.append((len(os.listdir(FILES)), threading.active_count()))
    checkpoints.close()
    files, threads = zip(*counts, strict=True)
    assert max(files[2:]) <= files[1] and max(threads[2:]) <= threads[1] + 1, counts
