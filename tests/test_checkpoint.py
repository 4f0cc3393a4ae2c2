"""What is damaged is noticed and kept; and no more memory than a state takes."""

import gc
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import types
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax import tree
from jax.sharding import NamedSharding, PartitionSpec
from processes import finish, free_port
from safetensors.numpy import load_file, save_file

from jvdit.machine import cluster
from jvdit.sharding import make_mesh
from jvdit.tasks import loop as loops
from jvdit.training import checkpoint, digests
from jvdit.training.checkpoint import Checkpoints
from jvdit.training.state import new_state, state_shardings
from jvdit.weights.parameters import load_weights, save_weights
from jvdit.weights.starting import finished_parameters

MANY, FEW = (8, 32, 64), (64, 8)


def weights(seed):
    chance = np.random.default_rng(seed)
    kernels = {f"fc_{i}": chance.normal(size=MANY) for i in range(12)}
    kernels["out"] = chance.normal(size=FEW)
    return {"dit": tree.map(lambda x: {"kernel": x.astype(np.float32)}, kernels)}


def training(optimizer):
    """A way to begin from parameters, the shapes of the state, and their places."""
    begin = partial(new_state, optimizer=optimizer)
    shapes = jax.eval_shape(begin, weights(0))
    return begin, shapes, state_shardings(shapes, make_mesh({"fsdp": 8}))


BEGIN, SHAPES, PLACES = training(optax.adamw(1e-3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1 and 2, and what they hold."""
    folder, held = tmp_path_factory.mktemp("saved"), {}
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        state = jax.device_put(BEGIN(weights(step)), PLACES)
        held[step] = tree.map(np.asarray, state)
        checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    return folder, held


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "run"), saved[1]


def restore(folder, shapes=SHAPES, places=PLACES):
    """The state and data, and what is said of damage."""
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(shapes, places), checkpoints.damaged
    finally:
        checkpoints.close()


def agree(a, b):
    tree.map(np.testing.assert_array_equal, a, b)


def numbers(step):
    """The file of a checkpoint that holds most of its arrays."""
    return max(step.glob("state/ocdbt.process_0/d/*"), key=lambda f: f.stat().st_size)


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "has changed": lambda step: flip(numbers(step)),
    "has 100 bytes and should": lambda step: os.truncate(numbers(step), 100),
    "_METADATA has 50 bytes": lambda step: os.truncate(step / "state/_METADATA", 50),
    "data/.* is missing": lambda step: empty(step / "data"),
    "can't be read": lambda step: os.truncate(step / "digests.0.json", 20),
    "": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_kept_and_the_one_before_taken(workdir, damage):
    folder, held = workdir
    DAMAGES[damage](folder / "checkpoints/2")
    before = sorted(f.name for f in (folder / "checkpoints/2").rglob("*"))
    (state, data), told = restore(folder)
    agree(state, held[1])
    assert data == {"step": 1}
    aside = folder / "checkpoints/2.damaged"
    assert sorted(f.name for f in aside.rglob("*")) == before
    (line,) = told
    assert line.startswith("checkpoint 2 is damaged, kept as 2.damaged (")
    assert re.search(damage, line) and "\n" not in line


def test_every_damage_to_a_file_is_found(saved, tmp_path):
    """Hundreds of random ones; numbers among them, which orbax doesn't guard."""
    whole = saved[0] / "checkpoints/2"
    assert digests.find_damage(whole) == "" and digests.is_listed(whole)
    step = shutil.copytree(whole, tmp_path / "2")
    files = [f for f in sorted(step.rglob("*")) if f.is_file()]
    for i in range(300):
        chance = random.Random(i)
        file = chance.choice(files)
        content = file.read_bytes()
        kind = chance.choice(["cut", "flip", "zero", "remove"])
        if kind == "cut":
            os.truncate(file, chance.randrange(len(content)))
        elif kind == "flip":
            flip(file, chance.random())
        elif kind == "zero":
            at = chance.randrange(len(content))
            file.write_bytes(content[:at] + bytes(9) + content[at + 9 :])
        else:
            file.unlink()
        if file.name != "digests.0.json":  # what it says of the others may still hold
            changed = not file.exists() or file.read_bytes() != content
            assert bool(digests.find_damage(step)) == changed, (kind, file)
        file.write_bytes(content)
    parts = [digests.find_damage(step, i, 3) for i in range(3)]
    assert parts == [""] * 3
    numbers(step).unlink()
    assert sorted(map(bool, (digests.find_damage(step, i, 3) for i in range(3)))) == [
        False,
        False,
        True,
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_without_digests_is_taken_if_it_can_be_read(workdir):
    """As those of before, and of a run killed between a checkpoint and its digests."""
    folder, held = workdir
    for file in folder.rglob("digests.*"):
        file.unlink()
    (state, data), told = restore(folder)
    agree(state, held[2])
    assert data == {"step": 2} and not told
    os.truncate(folder / "checkpoints/2/state/_METADATA", 50)
    (state, data), told = restore(folder)
    agree(state, held[1])
    assert data == {"step": 1} and len(told) == 1 and "\n" not in told[0]


def test_where_nothing_is_whole_nothing_begins_anew(workdir):
    folder, _ = workdir
    for step in (1, 2):
        flip(numbers(folder / f"checkpoints/{step}"))
    for _ in range(2):  # the same command again
        with pytest.raises(ValueError, match=r"no whole .*2\.damaged") as told:
            restore(folder)
        assert "1.damaged" in str(told.value)
    shutil.copytree(folder / "checkpoints/2.damaged", folder / "checkpoints/2")
    with pytest.raises(ValueError, match=r"kept as 2\.damaged1"):
        restore(folder)
    assert restore(folder.with_name("new"))[0] is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("listed", [True, False])
def test_another_optimizer_is_no_damage(workdir, listed):
    folder, held = workdir
    if not listed:
        for file in folder.rglob("digests.*"):
            file.unlink()
    _, shapes, places = training(optax.sgd(1.0, momentum=0.9))
    with pytest.raises(ValueError, match="begun with another optimizer"):
        restore(folder, shapes, places)
    agree(restore(folder)[0][0], held[2])


def test_digests_that_could_not_be_written_stop_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_digests", full)
    checkpoints = Checkpoints(tmp_path)
    state = jax.device_put(BEGIN(weights(0)), PLACES)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.wait()
    checkpoints.close()
    agree(restore(tmp_path)[0][0], state)


def test_a_training_says_what_was_damaged():
    loop, said = object.__new__(loops._Loop), []
    loop.config = types.SimpleNamespace(objective="flow")
    loop.task = types.SimpleNamespace(summary="")
    loop.state, loop.mesh = types.SimpleNamespace(params={}), make_mesh()
    loop.start, loop.data_note = 1, ""
    loop.checkpoints = types.SimpleNamespace(damaged=["checkpoint 2 is damaged"])
    loop._greet(types.SimpleNamespace(say=said.append))
    assert said[-1] == "WARNING: checkpoint 2 is damaged"


ONE_OF_TWO = """
import json, pathlib, sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
process, port, folder, steps = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from jax.sharding import NamedSharding, PartitionSpec
from jvdit.machine import cluster
from jvdit.training.checkpoint import Checkpoints
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
place = NamedSharding(mesh, PartitionSpec("all"))
def state(step):
    value = step + np.arange(4096, dtype=np.float32).reshape(4, 1024)
    return {"x": jax.make_array_from_callback(value.shape, place, lambda i: value[i])}
checkpoints = Checkpoints(folder)
shapes = jax.eval_shape(lambda: state(1))
found = checkpoints.restore(shapes, {"x": place})
value = found and float(found[0]["x"].addressable_data(0)[0, 0]) - 2048 * int(process)
told = json.dumps([found and found[1]["step"], value, *checkpoints.damaged])
pathlib.Path(folder, f"told.{process}").write_text(told)
for step in map(int, steps.split()):
    checkpoints.save(step, state(step), {"step": step})
checkpoints.wait()
checkpoints.close()
cluster._PIECE = 1 << 12
whole = cluster.to_host(state(7))["x"]
assert (whole.ravel() == 7 + np.arange(4096)).all()
"""


def two(folder, steps):
    """What two processes that restore and save are told: step, value, damage."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(i), port, str(folder), steps],
            env=environment,
        )
        for i in range(2)
    ]
    assert finish(running) == [0, 0]
    told = [json.loads((folder / f"told.{i}").read_text()) for i in range(2)]
    assert told[0] == told[1]
    return told[0]


def test_hosts_go_on_from_the_same_checkpoint(tmp_path):
    """Each lists what it wrote; what one of them finds damaged, none takes."""
    assert two(tmp_path, "1 2") == [None, None]
    step = tmp_path / "checkpoints/2"
    lists = [json.loads((step / f"digests.{i}.json").read_text()) for i in range(2)]
    assert all("ocdbt.process_1/" in name for name in lists[1]["files"])
    listed = {*lists[0]["files"], *lists[1]["files"]}
    files = {f.relative_to(step).as_posix() for f in step.rglob("*") if f.is_file()}
    assert files == listed | {"digests.0.json", "digests.1.json"}
    # Of those that the second looks at.
    name = max(sorted(listed)[1::2], key=lambda name: (step / name).stat().st_size)
    flip(step / name)
    found, value, damage = two(tmp_path, "2")
    assert (found, value) == (1, 1.0) and name in damage


# Memory


def bytes_on(device):
    """What all arrays take on a device; some are views of others."""
    shards = [shard for x in jax.live_arrays() for shard in x.addressable_shards]
    ours = [shard.data for shard in shards if shard.device == device]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in ours}.values())


def watched(monkeypatch, module):
    """The copies that are made, and the bytes on the last device after each."""
    copies, seen, copy = [], [], module.owned

    def owned(leaf):
        found = copy(leaf)
        a, b = (x.addressable_data(0).unsafe_buffer_pointer() for x in (leaf, found))
        assert a != b
        copies.append(found)
        seen.append(bytes_on(jax.devices()[-1]))
        return found

    monkeypatch.setattr(module, "owned", owned)
    return copies, seen


def test_a_state_is_restored_in_its_own_size(workdir, monkeypatch):
    folder, held = workdir
    gc.collect()  # what other tests have left counts for nobody
    before, (_, seen) = bytes_on(jax.devices()[-1]), watched(monkeypatch, checkpoint)
    (state, _), _ = restore(folder)
    agree(state, held[2])
    size = bytes_on(jax.devices()[-1]) - before
    assert size > 0 and max(seen) - before < 1.05 * size


def test_a_model_of_ones_own_is_divided_over_the_devices(tmp_path, monkeypatch):
    given, start = weights(3)["dit"], [bytes_on(d) for d in jax.devices()]
    save_weights(tmp_path / "dit", given, {})
    mesh = make_mesh({"fsdp": 8})
    params = finished_parameters(tmp_path, SHAPES.params, mesh)
    agree(params["dit"], given)
    whole = sum(x.nbytes for x in tree.leaves(given))
    for device, before in zip(jax.devices(), start, strict=True):
        assert bytes_on(device) - before == whole // 8

    # The state that begins with it, which the first step will be given to keep.
    loop = object.__new__(loops._Loop)
    loop.given, loop.begin, loop.shardings = params, BEGIN, PLACES
    del params
    copies, seen = watched(monkeypatch, loops)
    state = loop._fresh()
    for part in (state.params, state.ema):
        agree(part["dit"], given)
    assert max(seen) - start[-1] < 1.1 * whole / 8
    assert all(x.is_deleted() for x in copies)  # their memory is the state's
    jax.jit(lambda x: x, donate_argnums=0)(state)
    agree(load_weights(tmp_path / "dit")[0], given)


@pytest.mark.parametrize(
    "spec",
    [(None, "fsdp", "tensor"), ("fsdp", None, "tensor"), (None, None, "fsdp"), (None,)],
)
def test_hosts_gather_a_piece_at_a_time(monkeypatch, spec):
    """An array of several hosts never lies on a device whole."""
    monkeypatch.setattr(cluster, "_PIECE", 1 << 14)
    made, whole = [], cluster._gathering

    def gathering(*args):
        made.append(whole(*args))
        return made[-1]

    monkeypatch.setattr(cluster, "_gathering", gathering)
    x = np.random.default_rng(0).normal(size=(24, 20, 64)).astype(np.float32)
    place = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec(*spec))
    divided = jax.device_put(x, place)
    np.testing.assert_array_equal(cluster._gathered(divided), x)
    for gather in made:
        took = gather.lower(divided, 0).compile().memory_analysis()
        assert took.output_size_in_bytes + took.temp_size_in_bytes < 3 * (1 << 14)
    assert bool(made) == (spec != (None,))


# Weights


def test_weights_that_changed_are_refused(tmp_path):
    params = {"a": {"kernel": np.ones((64, 64), np.float32)}}
    save_weights(tmp_path, params, {"width": 4})
    file = tmp_path / "weights.safetensors"
    agree(load_weights(tmp_path)[0], params)
    content = file.read_bytes()
    flip(file)
    for read in (load_weights, partial(finished_parameters, mesh=make_mesh())):
        wanted = [{tmp_path.name: params}][: read is not load_weights]
        folder = tmp_path if read is load_weights else tmp_path.parent
        with pytest.raises(ValueError, match="has changed since it was written"):
            read(folder, *wanted)
    # Written by something else in its place, or by a version without digests.
    file.write_bytes(content)
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    agree(flatten_dict(load_weights(tmp_path)[0])["a", "kernel"], np.full((64, 64), 2))
    pathlib.Path(tmp_path, "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        load_weights(tmp_path)
