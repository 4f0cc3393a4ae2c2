"""Data sets of latents: the same however many devices and processes make them."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from jax.sharding import Mesh
from processes import finish, free_port, kill, wait_for

from jvdit.data.records import RecordDataset
from jvdit.machine import cluster
from jvdit.models.video_vae import VARIANTS, VideoVAE
from jvdit.sharding import AXES
from jvdit.tasks.encoding import encode
from jvdit.weights import encoders
from jvdit.weights.encoders import ClipEncoder
from jvdit.weights.parameters import module_fields, save_weights

SIZE = (5, 16, 16)
SOURCE = "world:train:5x16x16@8:40"
VALIDATION = "world:val:5x16x16@8:3"
SHARD = 2


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An autoencoder that was never trained."""
    module = VideoVAE(**VARIANTS["tiny"])
    video = jnp.zeros((1, 5, 16, 16, 3))
    params = jax.jit(module.init)(jax.random.key(0), video)["params"]
    folder = tmp_path_factory.mktemp("autoencoder")
    save_weights(folder / "vae", params, module_fields(module))
    return folder


@pytest.mark.parametrize("pieces", [False, True])
def test_devices_share_a_batch(vae, monkeypatch, pieces):
    """Of clips that are encoded whole, and of those that are piece by piece."""
    if pieces:
        monkeypatch.setattr(encoders, "PIXELS", 5 * 16 * 16 - 1)
    many = ClipEncoder.load(vae)
    rows = many.rows(11, SIZE)
    assert rows == (8 if pieces else 16)
    video = np.random.default_rng(0).integers(0, 256, (rows, *SIZE, 3), np.uint8)
    shared = many(video)
    for moment in shared:
        parts = {shard.data.shape[0] for shard in moment.addressable_shards}
        assert parts == {rows // 8} and len(moment.sharding.device_set) == 8

    alone = Mesh(np.reshape(jax.devices()[:1], (1, 1, 1, 1)), AXES)
    monkeypatch.setattr(encoders, "host_mesh", lambda: alone)
    one = ClipEncoder.load(vae)
    assert one.rows(11, SIZE) == (1 if pieces else 16)
    whole = one(video)
    for x, y in zip(shared, whole, strict=True):
        assert np.std(y) > 0
        assert_close(x, y)


def test_each_process_has_its_shards(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(cluster, "wait_for_others", lambda where: None)
    monkeypatch.setattr(cluster, "check_alike", lambda settings: None)
    monkeypatch.setattr(cluster, "held", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "_SEEN_WITHIN", 0)
    seen, done = [], set()
    for process in (1, 2, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        try:
            encode(SOURCE, str(vae), str(tmp_path), VALIDATION, shard=SHARD)
        except ValueError as error:
            seen.append(str(error))
        found = {x.stem for x in tmp_path.rglob("_work/*-*.json")}
        assert process == 0 or len(found - done) in (7, 8)  # of 20 and 2
        done |= found
    told = f"doesn't see what process 0 wrote to {tmp_path}/vae/config.json"
    assert [told in error for error in seen] == [True, True]
    assert len(RecordDataset(tmp_path)) == 40
    assert len(RecordDataset(tmp_path, "val")) == 3


def test_processes_that_were_killed_go_on(vae, tmp_path):
    """Two of them, told so by the command line; the records are those of one."""
    whole, shared = tmp_path / "whole" / "set", tmp_path / "shared" / "set"
    assert finish(launch(vae, whole, 1)) == [0]
    running = launch(vae, shared, 2)
    wait_for(running, lambda: [*shared.rglob("_work/train-*.json")])
    kill(running)
    assert finish(launch(vae, shared, 2)) == [0, 0]
    for split in "train", "val":
        a, b = RecordDataset(whole, split), RecordDataset(shared, split)
        assert a.fingerprint == b.fingerprint
    for file in "config.json", "weights.safetensors":
        name = f"vae/{file}"
        assert (whole / name).read_bytes() == (shared / name).read_bytes()


def launch(vae, out, processes):
    """Processes that encode together, with a device each."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "jvdit.encode", f"--vae={vae}", f"--out={out}"]
    command += [f"--source={SOURCE}", f"--validation={VALIDATION}", f"--shard={SHARD}"]
    command += [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
    return [
        subprocess.Popen([*command, f"--process={i}"], env=environment)
        for i in range(processes)
    ]
