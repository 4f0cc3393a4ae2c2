"""Coordinates the processes of one run: the hosts of a TPU pod or of a cluster."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvdit.machine.json_files import differences
from jvdit.machine.lock import FolderLock, sweep

_PATIENCE = 24 * 3600  # seconds that one process waits for another at most
_SEEN_WITHIN = 60  # seconds within which hosts see each other's files over NFS
_HEARTBEAT = 30  # seconds of silence after which a process counts as lost
# Metadata of a Google Cloud machine that announce its maintenance or preemption.
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_PIECE = 64 << 20  # bytes of an array that are gathered on every device at once
_NO_CLUSTER = "coordinator_address should be defined"
# Counts of exchanges so far, which are the same on all processes.
_told, _asked = itertools.count(), itertools.count(1)


def connect(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Connects the processes of a run; call it before anything else of JAX.

    On TPU VMs, GKE and under SLURM or MPI the processes find one another without the
    arguments; where there is no cluster, this process runs alone.

    Args:
        coordinator: HOST:PORT of process 0, where no cluster provides it.
        processes: with `coordinator`: how many processes there are.
        process: with `coordinator`: the index of this process, from 0.

    Raises:
        ValueError: only some of the three are given.
        ConnectionError: the other processes can't be reached. The run doesn't continue
            alone, since it would train a different model from the one asked for.
    """
    told = bool(coordinator), processes > 0, process >= 0
    if any(told) and not all(told):
        raise ValueError(
            f"`coordinator` (={coordinator!r}), `processes` (={processes}) and "
            f"`process` (={process}) go together; give all three, or none on a TPU "
            "pod, GKE or SLURM, which know them."
        )
    try:
        if all(told):
            jax.distributed.initialize(
                coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT
            )
        else:
            jax.distributed.initialize()
    except Exception as error:
        if isinstance(error, ValueError) and _NO_CLUSTER in str(error):
            return
        raise ConnectionError(
            f"the other processes of this run can't be reached: {error} (One that is "
            "alone says so: --coordinator localhost:7000 --processes 1 --process 0)"
        ) from error


def define_flags() -> Callable[[], None]:
    """Defines the command-line flags of `connect`.

    Returns:
        A function that calls `connect` with the flags' values.
    """
    coordinator = flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0, on machines that no cluster software connects.",
    )
    processes = flags.DEFINE_integer(
        "processes", 0, "Number of processes of the run, with --coordinator."
    )
    process = flags.DEFINE_integer(
        "process", -1, "Number of this process, from 0, with --coordinator."
    )
    return lambda: connect(coordinator.value, processes.value, process.value)


def is_lead() -> bool:
    """Whether this is process 0, which writes what only one process should."""
    return jax.process_index() == 0


def own_file(path: pathlib.Path) -> pathlib.Path:
    """The name of a file that each process writes for itself, with its index in it."""
    if jax.process_count() == 1:
        return path
    return path.with_stem(f"{path.stem}_{jax.process_index()}")


def to_host(tree: Any) -> Any:
    """Gathers arrays that are sharded over all hosts as numpy arrays on every host.

    Every process must call this.
    """

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        return _gathered(x)

    return jax.tree.map(whole, tree)


def _gathered(x: jax.Array) -> np.ndarray:
    """Gathers an array that is sharded over hosts, piece by piece.

    All layers of a network lie in one array, which can be too large for one device.
    """
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    local = x.sharding.shard_shape(x.shape)
    undivided = [a for a in range(x.ndim) if local[a] == x.shape[a]]
    small = x.nbytes <= _PIECE or not undivided
    if small or not isinstance(x.sharding, NamedSharding):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    axis = max(undivided, key=lambda a: x.shape[a])
    size = max(x.shape[axis] * _PIECE // x.nbytes, 1)
    gather = _gathering(axis, size, NamedSharding(x.sharding.mesh, PartitionSpec()))
    whole = np.empty(x.shape, x.dtype)
    for start in range(0, x.shape[axis], size):
        # All pieces have one size, compiled once; the last overlaps the one before.
        start = min(start, x.shape[axis] - size)
        part = (slice(None),) * axis + (slice(start, start + size),)
        whole[part] = gather(x, start).addressable_data(0)
    return whole


@lru_cache
def _gathering(axis: int, size: int, place: NamedSharding) -> Callable[..., jax.Array]:
    """A compiled function that gathers a slice of an array on every device."""

    def gather(x: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    return jax.jit(gather, out_shardings=place)


def wait_for_others(where: str) -> None:
    """Waits until all processes have called this; `where` names the barrier."""
    if jax.process_count() > 1:
        # The import takes a third of a second, which a single process can save.
        import orbax.checkpoint as ocp

        everyone = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes(
            where, timeout=_PATIENCE, processes=everyone
        )


def tell_all(text: str) -> list[str]:
    """Exchanges a text between all processes; every process must call this.

    Returns:
        The texts of all processes, in order.
    """
    if jax.process_count() == 1:
        return [text]
    import orbax.checkpoint as ocp

    # JAX's key-value store, which the processes share.
    store, key = ocp.multihost.get_jax_distributed_client(), f"jvdit/{next(_told)}"
    store.key_value_set(f"{key}/{jax.process_index():06}", json.dumps(text))
    wait_for_others(f"told {key}")
    found = sorted(store.key_value_dir_get(key))
    wait_for_others(f"read {key}")  # else process 0, and the store, might end before
    return [json.loads(told) for _, told in found]


def check_seen(path: pathlib.Path) -> None:
    """Checks that every process sees a file that process 0 wrote.

    Every process must call this.

    Raises:
        ValueError: this process doesn't see it within a minute.
    """
    wait_for_others(f"wrote {path}")
    await_seen(path.exists, f"what process 0 wrote to {path}")


def await_seen(seen: Callable[[], bool], what: str) -> None:
    """Waits until this process sees what another wrote, which over NFS takes a while.

    Args:
        seen: returns whether it is seen yet.
        what: what it is, for the error message.

    Raises:
        ValueError: it isn't seen within a minute.
    """
    deadline = time.monotonic() + _SEEN_WITHIN
    while not seen():
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {jax.process_index()} doesn't see {what}, which must lie in "
                "a folder that all hosts share."
            )
        time.sleep(1)


def from_lead(make: Callable[[], Any]) -> Any:
    """Runs a function on process 0, and returns its result on every process.

    Every process must call this.

    Args:
        make: the function; its result must be a JSON value.

    Raises:
        ValueError: `make` raised a ValueError or an OSError; raised on all processes.
    """
    if jax.process_count() == 1:
        return make()
    told = ""
    if is_lead():
        try:
            told = json.dumps([make(), None])
        except (ValueError, OSError) as raised:
            told = json.dumps([None, str(raised)])
    made, error = json.loads(tell_all(told)[0])
    if error is not None:
        raise ValueError(error)
    return made


def check_alike(settings: Mapping[str, Any]) -> None:
    """Checks that every process was given the same settings.

    Every process must call this.

    Raises:
        ValueError: some differ; raised on all processes, with what differs.
    """
    if jax.process_count() == 1:
        return
    ours = json.loads(json.dumps(settings, default=str))
    differing = "; ".join(differences(from_lead(lambda: ours), ours))
    told = f"process {jax.process_index()}: {differing}" if differing else ""
    if found := list(filter(None, tell_all(told))):
        raise ValueError(
            "the processes of this run were told other settings than process 0 "
            f"(`there`): {' | '.join(found)}. Start all with the same command."
        )


@contextlib.contextmanager
def held(folder: str | os.PathLike[str]) -> Iterator[FolderLock]:
    """Locks a folder for all processes of this run; see `FolderLock`.

    Files that killed processes left half written there are removed.

    Args:
        folder: the folder, created if needed.

    Yields:
        The lock.

    Raises:
        ValueError: another run holds the folder.
    """
    lock = FolderLock(folder)

    def take():
        lock.acquire()
        sweep(folder)

    try:
        from_lead(take)
        yield lock
    finally:
        if lock.held and jax.process_count() == 1:  # others might still be writing
            sweep(folder)
        lock.release()


def all_asked_to_stop() -> bool:
    """Whether all processes should stop at this step, because one was asked to.

    The processes agree on the step, although the signal (SIGTERM, or the notice before
    a TPU is preempted) reaches them at different times. Every process must call this
    equally often.
    """
    return multihost_utils.reached_preemption_sync_point(next(_asked))


def heed_notices(metadata: str = _METADATA) -> None:
    """Sends this process a SIGTERM when its machine is about to be taken away.

    Google announces maintenance of a TPU minutes ahead, and preemption half a minute
    ahead. On other machines nothing happens.

    Args:
        metadata: address of the metadata server.
    """
    for name, leaving in _NOTICES.items():
        # The server answers when the value changes.
        address = f"{metadata}/{name}?wait_for_change=true"
        watch = threading.Thread(target=_wait_for, args=(address, leaving), daemon=True)
        watch.start()


def _wait_for(address: str, leaving: str) -> None:
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    while True:
        try:
            with urllib.request.urlopen(request) as answer:
                told = answer.read().decode().strip()
        except OSError:
            time.sleep(_HEARTBEAT)
            continue
        if told == leaving:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def share_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Finds the part of each batch that this process reads.

    Processes whose devices hold the same rows, because tokens are divided over several
    hosts, read the same part.

    Returns:
        The index of the part, and how many equal parts there are.

    Raises:
        ValueError: the rows of two processes overlap without being the same.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    by_row = mesh.devices.reshape(ways, -1)
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(by_row):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    ours = tuple(sorted(rows[jax.process_index()]))
    whole = sorted(row for part in parts for row in part) == [*range(ways)]
    if not whole or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives processes parts of a batch that overlap: "
            f"{parts}; make `data` times `fsdp` a multiple or a divisor of the "
            f"{jax.process_count()} processes."
        )
    return parts.index(ours), len(parts)
