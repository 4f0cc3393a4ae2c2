"""A folder is one run's at a time, and free again when that has ended, however."""

import os
import subprocess
import sys
import threading
import time

import pytest

from jvdit.machine import lock
from jvdit.machine.lock import FolderLock, sweep

HOLD = """
import sys, time
from jvdit.machine.lock import FolderLock
FolderLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(600)
"""


def quick(patch, **also):
    """Makes a minute a fraction of a second."""
    found = {"_BEAT": 0.05, "_SILENCE": 1.0, "_SETTLING": 0.3, "_PAUSE": 0.02} | also
    for name, value in found.items():
        patch.setattr(lock, name, value)


def test_the_living_hold_it_and_the_dead_do_not(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    ours = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"held by another.*process {process.pid} on"):
        ours.acquire()
    ours.release()  # of what it doesn't hold
    assert (tmp_path / ".lock").exists()
    process.kill()
    process.communicate()
    begun = time.monotonic()
    ours.acquire()
    assert time.monotonic() - begun < lock._SILENCE / 10
    assert "waiting" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).acquire()
    ours.release()
    assert not [*tmp_path.iterdir()]
    ours = FolderLock(tmp_path)
    ours.acquire()
    ours.release()


@pytest.mark.parametrize("flock", [True, None])
def test_another_host_is_known_by_its_heartbeat(tmp_path, monkeypatch, capsys, flock):
    """With a lock that only one host sees, or none at all, as in a mounted bucket."""
    quick(monkeypatch)
    monkeypatch.setattr(lock, "_flock", lambda file: flock)
    theirs, ours = FolderLock(tmp_path), FolderLock(tmp_path)
    theirs.acquire()
    monkeypatch.setattr(lock, "_place", lambda folder: "elsewhere")
    with pytest.raises(ValueError, match="held by another run"):
        ours.acquire()
    theirs._released.set()  # it is suspended: no sign of life, and then it wakes
    time.sleep(0.2)
    ours.acquire()
    assert "waiting up to 1 s" in capsys.readouterr().out
    ours.check()
    with pytest.raises(ValueError, match="held by another run"):
        theirs.check()
    theirs.release()
    assert (tmp_path / ".lock").exists() and ours.held
    ours.release()
    assert not [*tmp_path.iterdir()]


def test_of_two_that_follow_a_dead_one_one_does(tmp_path, monkeypatch):
    quick(monkeypatch)
    dead = FolderLock(tmp_path)
    dead.acquire()
    dead._released.set()
    assert dead._file is not None
    dead._file.close()
    monkeypatch.setattr(lock, "_flock", lambda file: True)
    monkeypatch.setattr(lock, "_place", lambda folder: "elsewhere")
    locks, refused = [FolderLock(tmp_path) for _ in range(2)], []

    def follow(each):
        try:
            each.acquire()
        except ValueError:
            refused.append(each)

    threads = [threading.Thread(target=follow, args=(each,)) for each in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    assert [each.held for each in locks].count(True) == 1
    for each in locks:
        each.release()


def test_only_what_our_writers_left_is_swept(tmp_path):
    folder = tmp_path / "checkpoints"  # a workdir may be called so
    left = ["model/dit/.tmp@host@12@weights.safetensors", "config.json.12.tmp"]
    left += ["renamed.12.0.tmp/folder/file", "checkpoints/4.orbax-checkpoint-tmp/a"]
    left += ["model/dit/weights.12.tmp", ".tmp@host@12@looked.json"]
    kept = ["checkpoints/3/a", "model/dit/weights.safetensors", "mine.tmp", "a/b.1.tmp"]
    for name in left + kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    sweep(folder)
    files = {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}
    assert files == set(kept)
    assert not (folder / "renamed.12.0.tmp").exists()
