"""Several processes train one model, as hosts of a pod do; over loopback, on CPUs."""

import collections
import dataclasses
import http.server
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from typing import ClassVar

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from processes import finish, free_port, kill, wait_for

from jvdit.machine import cluster
from jvdit.machine.cluster import connect, share_of_rows, to_host
from jvdit.machine.lock import FolderLock
from jvdit.sharding import AXES
from jvdit.tasks import loop as loops
from jvdit.training.metrics import Metrics, Throughput
from jvdit.weights.parameters import load_weights

HERE = pathlib.Path(__file__).parent
RUN = ("--config.checkpoint_every=3",)
RUN += ("--config.sample_every=0", "--config.evaluate_every=0")
RUN += ("--config.sample.prompts=()", "--config.sample.scored=0")
RUN += ("--config.data.validation=", "--config.mesh.fsdp=4")


def settings(thread, folder):
    """The flow stage of the small thread, as a config file."""
    config = folder / "cluster_config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from thread_config import flow_config\n"
        f"def get_config():\n    return flow_config({str(thread)!r})\n"
    )
    return config


def launch(config, workdir, processes, steps):
    """Processes of one run, which have four devices together."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, HERE / "one_of_many.py", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.steps={steps}", *RUN]
    command += [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
    return [
        subprocess.Popen([*command, f"--process={i}"], env=environment)
        for i in range(processes)
    ]


def newest(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def being_written(workdir):
    """Of checkpoints, the folder's name and number: the same step is begun again."""
    try:
        with os.scandir(workdir / "checkpoints") as found:
            return {(x.name, x.inode()) for x in found if "tmp" in x.name}
    except FileNotFoundError:
        return set()


def averages(workdir):
    """What a run leaves: the averages of its weights, which saw all of its updates."""
    return {x: load_weights(workdir / "model" / x)[0] for x in ("dit", "text_encoder")}


def distance(a, b):
    """The length of what two trees of weights differ by."""
    return optax.global_norm(jax.tree.map(np.subtract, a, b))


def one_life(config, workdir, steps, chance):
    """Processes that are killed: one of them, or all, at any time or in a save."""
    before, left = newest(workdir), being_written(workdir)
    running = launch(config, workdir, 2, steps)
    if chance.random() < 0.5:
        wait_for(running, lambda: being_written(workdir) - left)
    else:
        wait_for(running, lambda: newest(workdir) > before)
        time.sleep(chance.uniform(0, 0.5))
    if chance.random() < 0.5:
        kill(running)
        return
    running[chance.randrange(2)].kill()
    # Those that are left can't go on alone, and do not wait for ever.
    assert finish(running) != [0] * 2


def test_hosts_come_and_go_and_the_run_is_the_same(latents, tmp_path, pytestconfig):
    """Killed at random, then told to stop: the bits of a run that never stopped."""
    config, kills = settings(latents, tmp_path), pytestconfig.getoption("kills")
    whole, broken, fewer = (tmp_path / x for x in ("whole", "broken", "fewer"))
    steps = 6 * kills + 15  # a life ends after three to six
    assert finish(launch(config, whole, 2, steps)) == [0] * 2
    chance = random.Random(0)
    for _ in range(kills):
        one_life(config, broken, steps, chance)

    running, before = launch(config, broken, 2, steps), newest(broken)
    wait_for(running, lambda: newest(broken) > before)
    running[0].send_signal(signal.SIGTERM)
    assert finish(running) == [0] * 2
    assert before < newest(broken) < steps
    shutil.copytree(broken, fewer)
    begun = averages(fewer)

    assert finish(launch(config, broken, 2, steps)) == [0] * 2
    a, b = averages(whole), averages(broken)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)

    # Other numbers of processes and devices in each: the same clips in the same order.
    assert finish(launch(config, fewer, 1, steps)) == [0]
    # Adam magnifies what rounding leaves of a gradient near 0, but moves few weights by
    # it; other clips would move them all.
    assert distance(averages(fewer), a) < 0.01 * distance(begun, a)
    assert newest(whole) == newest(broken) == newest(fewer) == steps


def test_hosts_have_to_share_their_workdir(tmp_path, monkeypatch):
    (tmp_path / "seen").touch()
    monkeypatch.setattr(cluster, "_SEEN_WITHIN", 0)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    cluster.check_seen(tmp_path / "seen")
    with pytest.raises(ValueError, match="process 1 doesn't see what process 0 wrote"):
        cluster.check_seen(tmp_path / "not seen")


@pytest.mark.parametrize("process", [0, 1])
def test_each_host_tells_and_lists_its_bad_clips(
    process, tmp_path, monkeypatch, capsys, request
):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    loop = object.__new__(loops._Loop)  # as much as the account of a step asks for
    loop.workdir, loop.recent = tmp_path, collections.deque(maxlen=2)
    loop.config = types.SimpleNamespace(max_skipped=2, log_every=0)
    clips = [f"clips:{process}"]
    loop.task = types.SimpleNamespace(counts=lambda _: {}, names=lambda _: clips)
    bad = collections.deque([(7, 40 + process, "torn")])
    batches, rates = types.SimpleNamespace(bad=1, reports=bad), Throughput()
    metrics = Metrics(tmp_path, 10, 0, "flow")
    request.addfinalizer(lambda: metrics.__exit__(None, None, None))
    loop._account(metrics, (7, {"skipped_in_a_row": 1}, {}, 0.0), rates, batches)
    told = f"process {process}: step 7: left out clip 4{process}: torn\n"
    assert capsys.readouterr().out == told
    pending = 8, {"skipped_in_a_row": 2}, {}, 0.0
    with pytest.raises(FloatingPointError, match=f"bad_clips_{process}.json, the last"):
        loop._account(metrics, pending, rates, batches)
    assert (
        json.loads((tmp_path / f"bad_clips_{process}.json").read_text()) == [clips] * 2
    )


def test_processes_tell_each_other_what_they_were_told(tmp_path):
    """Other settings, or another run in the folder, are refused by all of them."""
    command = [sys.executable, HERE / "told.py", f"localhost:{free_port()}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    theirs = FolderLock(tmp_path)
    theirs.acquire()
    running = [
        subprocess.Popen([*command, str(i), tmp_path], env=environment, stdout=-1)
        for i in range(2)
    ]
    told = [process.communicate(timeout=300)[0].decode() for process in running]
    theirs.release()
    assert finish(running) == [0, 0]
    for i, text in enumerate(told):
        differing, held, asked, refused = text.splitlines()
        assert "process 1: `optim.lr` is 0.0001 there but 0.5 here" in differing
        assert held == str(i == 0) and asked == "False"
        assert f"held by another run (process {os.getpid()} on" in refused
    assert not [*(tmp_path / "free").iterdir()]


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as the metadata server of a TPU: nothing, a fault, then the notice."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):  # noqa: D102, N802
        self.asked.append(self.path)
        known = self.headers["Metadata-Flavor"] == "Google"
        told = {1: "NONE", 3: "TERMINATE_ON_HOST_MAINTENANCE"}.get(len(self.asked))
        self.send_response(200 if known and told else 503)
        self.end_headers()
        self.wfile.write(f"{told}\n".encode())

    def log_message(self, *args):
        """Says nothing."""


def test_a_notice_of_maintenance_is_a_sigterm(monkeypatch):
    got = threading.Event()
    monkeypatch.setattr(cluster, "_HEARTBEAT", 0.01)
    monkeypatch.setattr(
        cluster, "_NOTICES", {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
    )
    sent = []
    monkeypatch.setattr(os, "kill", lambda *a: (sent.append(a), got.set()))
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster.heed_notices(f"http://localhost:{server.server_port}/instance")
        assert got.wait(timeout=60)
        server.shutdown()
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert Metadata.asked == ["/instance/maintenance-event?wait_for_change=true"] * 3


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
