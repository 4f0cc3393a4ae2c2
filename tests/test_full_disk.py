"""A full disk is one line, whoever meets it, and leaves nothing half."""

import contextlib
import errno
import os
import threading
import time

import numpy as np
import pytest
from safetensors import SafetensorError
from tensorboardX import record_writer

from jvdit.machine import files, json_files
from jvdit.machine.files import FullDiskError, said_if_full
from jvdit.training.metrics import Metrics, read_history
from jvdit.weights import parameters as weights
from jvdit.weights.parameters import load_weights, save_weights

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# As the libraries say it.
OTHERS = [
    FULL,
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"),
    OSError("100000 requested and 4096 written"),
    SafetensorError("Error while serializing: I/O error: No space left on device"),
    RuntimeError("write() failed: No space left on device; at byte 9"),
    ValueError(
        'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database:\n'
        "Failed to write 711457 bytes to file 4: No space left on device [os_error…"
    ),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("behind", [False, True])
def test_whatever_a_library_raises_is_one_line(error, behind):
    with pytest.raises(FullDiskError, match="disk is full at runs/a: .*") as raised:
        with said_if_full("elsewhere/b"), said_if_full("runs/a"):
            if not behind:
                raise error
            try:
                raise error
            except Exception:
                raise RuntimeError("a thread has failed") from None
    assert "\n" not in str(raised.value) and "Make room" in str(raised.value)


def test_weights_are_for_whoever_may_read_other_files(tmp_path):
    save_weights(tmp_path / "a", {"kernel": np.zeros(2)}, {})
    (tmp_path / "other").touch()
    mode = (tmp_path / "other").stat().st_mode
    assert (tmp_path / "a/weights.safetensors").stat().st_mode == mode


def test_another_error_stays_what_it_is():
    for error in (ValueError("no"), FileNotFoundError(errno.ENOENT, "x", "y")):
        with pytest.raises(type(error)) as raised, said_if_full():
            raise error
        assert raised.value is error


def test_weights_that_have_no_room_leave_the_old_ones(tmp_path, monkeypatch):
    save_weights(tmp_path, {"a": np.zeros(3)}, {"width": 3})

    def full(tensors, scratch, **_):
        scratch.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "save_file", full)
        with pytest.raises(FullDiskError, match="weights.safetensors"):
            save_weights(tmp_path, {"a": np.ones(3)}, {"width": 3})
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(FULL))
        with pytest.raises(FullDiskError, match="config.json"):
            json_files.write_json(tmp_path / "config.json", {})
    params, fields = load_weights(tmp_path)
    assert not params["a"].any() and fields == {"width": 3}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"weights.safetensors", "config.json"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_tensorboard_has_no_thread_that_dies_untold(tmp_path, monkeypatch):
    before = threading.active_count()
    full = open("/dev/full", "wb")
    monkeypatch.setattr(record_writer, "open_file", lambda _: full)
    with pytest.raises(FullDiskError), said_if_full():
        with Metrics(tmp_path, 10, 0, "x") as metrics:
            for step in range(1000):  # more than a queue, and a buffer, hold
                metrics.scalars(step, {"loss": 1.0})
    with contextlib.suppress(OSError):
        full.close()
    until = time.monotonic() + 10  # a thread that ends takes a moment
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.1)
    assert threading.active_count() <= before


def test_a_line_of_history_that_was_cut_off_costs_no_other(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "l')
    with Metrics(tmp_path, 10, 1, "x") as metrics:
        metrics.scalars(2, {"loss": 1.0})
    assert read_history(tmp_path) == {"loss": [(1, 2.0), (2, 1.0)]}
