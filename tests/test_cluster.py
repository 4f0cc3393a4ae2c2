"""Several processes train one model, as hosts of a pod do; over loopback, on CPUs."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jvdit.cluster import connect, share_of_rows, to_host
from jvdit.sharding import AXES
from jvdit.training.checkpoint import load_weights

HERE = pathlib.Path(__file__).parent
STEPS = 60
RUN = (f"--config.steps={STEPS}", "--config.checkpoint_every=10")
RUN += ("--config.sample_every=1000", "--config.evaluate_every=1000")
RUN += ("--config.sample.prompts=()", "--config.mesh.fsdp=2")


def settings(thread, folder):
    """The flow stage of the small thread, as a config file."""
    config = folder / "cluster_config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from thread_config import flow_config\n"
        f"def get_config():\n    return flow_config({str(thread)!r})\n"
    )
    return config


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def launch(config, workdir, processes, devices=2):
    """Processes of one run, with some devices each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # as in conftest.py
    }
    command = [sys.executable, "-m", "jvdit.train", f"--config={config}"]
    command += [f"--workdir={workdir}", *RUN]
    if processes > 1:
        command += [f"--coordinator=localhost:{free_port()}"]
        command += [f"--processes={processes}"]
    return [
        subprocess.Popen(
            [*command, *([f"--process={i}"] if processes > 1 else [])], env=environment
        )
        for i in range(processes)
    ]


def finish(processes, timeout=300):
    """Exit codes of processes, which end by themselves."""
    deadline = time.monotonic() + timeout
    try:
        return [p.wait(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_step(processes, workdir, step):
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / str(step)).exists():
        assert all(p.poll() is None for p in processes), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def averages(workdir):
    """What a run leaves: the averages of its weights, which saw all of its updates."""
    assert max(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")) == STEPS
    return {x: load_weights(workdir / "model" / x)[0] for x in ("dit", "text_encoder")}


def test_hosts_come_and_go_and_the_run_is_the_same(workdir, tmp_path):
    """Two processes; one killed, then one told to stop, then one alone to the end."""
    config = settings(workdir, tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(launch(config, whole, 2)) == [0, 0]

    running = launch(config, broken, 2)
    wait_for_step(running, broken, 10)
    running[1].kill()
    # The one that is left can't go on alone, and does not wait for ever.
    assert finish(running)[0] != 0

    running = launch(config, broken, 2)
    wait_for_step(running, broken, 30)
    running[0].send_signal(signal.SIGTERM)
    assert finish(running) == [0, 0]
    assert finish(launch(config, broken, 2)) == [0, 0]
    a, b = averages(whole), averages(broken)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)

    # Other numbers of processes and devices: the same clips in the same order.
    alone = tmp_path / "alone"
    assert finish(launch(config, alone, 1, devices=4)) == [0]
    c = averages(alone)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh asks for."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def hosts(shape, processes):
    """A mesh of devices that are spread over processes, in order."""
    count = int(np.prod(shape))
    devices = np.empty(count, object)
    for i in range(count):
        devices[i] = Device(i, i * processes // count)
    return Mesh(devices.reshape(shape), AXES)


@pytest.mark.parametrize(
    "shape, processes, parts",
    [
        ((1, 8, 1, 1), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 1, 8, 1), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a row over two hosts
        ((1, 1, 8, 1), 2, [(0, 1), (0, 1)]),
        ((4, 2, 1, 2), 2, [(0, 2), (1, 2)]),
    ],
)
def test_hosts_that_share_a_row_read_the_same(monkeypatch, shape, processes, parts):
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert share_of_rows(hosts(shape, processes)) == part


def test_rows_that_hosts_share_in_part_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match="overlap"):
        share_of_rows(hosts((3, 1, 2, 1), 2))


def test_a_coordinator_alone_is_not_enough():
    with pytest.raises(ValueError, match="go together"):
        connect("localhost:1", 2)


def test_arrays_come_to_the_host_whole():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = np.arange(16.0)
    np.testing.assert_array_equal(to_host({"x": jax.device_put(x, place)})["x"], x)
