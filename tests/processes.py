"""Processes that a test starts together, as hosts of a pod."""

import socket
import time


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def finish(processes, timeout=300):
    """Exit codes of processes, which end by themselves."""
    deadline = time.monotonic() + timeout
    try:
        return [p.wait(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        kill(processes)


def kill(processes):
    """Ends processes at once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def wait_for(processes, happened):
    """Returns what happened, while the processes run."""
    deadline = time.monotonic() + 300
    while not (found := happened()):
        assert all(p.poll() is None for p in processes), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found
