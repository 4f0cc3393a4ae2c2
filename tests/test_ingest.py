"""Properties of ingest: every file accounted for, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ingest_work
import numpy as np
import pytest
import tensorflow_datasets as tfds
from media_files import clicks, frames_of, mux, numbered, numbers

from jvdit.data.ingest import supervisor
from jvdit.data.ingest.clip_file import ClipFile, Recipe
from jvdit.data.ingest.ingest import ingest
from jvdit.data.ingest.shard_plan import plan_shards
from jvdit.data.ingest.supervisor import supervise
from jvdit.data.media.reader import decode_clip
from jvdit.data.media.writer import encode_clip
from jvdit.data.records import RecordDataset

HERE = Path(__file__).parent
CLIPS = HERE.parents[1] / "shared" / "clips"
RECIPE = Recipe(
    frames=5, fps=8, sizes=((32, 48),), audio_rate=16000, preset="ultrafast"
)


def video(first=0, count=12, size=(48, 64)):
    """Frames of which the brightness says which one it is; no two files are equal."""
    frames = numbered(first + count)[first:, :1, :1]
    return np.broadcast_to(frames, (count, *size, 3))


def write(path, first=0, *, count=12, size=(48, 64), sound=None, caption=None):
    encode_clip(path, video(first, count, size), 8, audio=sound, audio_rate=48000)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files good and bad."""
    root = tmp_path_factory.mktemp("videos")
    write(root / "a.mp4", 1, sound=clicks((0.25,), 2), caption="with a click")
    write(root / "deep" / "b.mp4", 2, caption="mute", count=20)
    write(root / "tall.mp4", 3, size=(64, 48))
    write(root / "short.mp4", 4, count=3)
    write(root / "tiny.mp4", 5, size=(20, 24))
    (root / "empty.mp4").touch()
    (root / "text.mov").write_text("not a video")
    (root / ".hidden.mp4").write_text("not looked at")
    data = bytearray((root / "deep" / "b.mp4").read_bytes())
    (root / "copy.mp4").write_bytes(data)
    (root / "copy.txt").write_text("mute")
    dropped = [0, 1, 6, 7, 8, 9, 10, 11]
    vfr = mux(frames_of(video(6)[dropped]), times=np.array(dropped) / 8, fps=8)
    (root / "vfr.mp4").write_bytes(vfr)
    return root


def files_of(path):
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_folder_becomes_a_data_set(folder, tmp_path):
    report = ingest([folder], tmp_path / "clips", RECIPE, workers=2, shard_size=3)
    reasons = {e["file"]: e["reason"] for e in report.files}
    assert reasons == {
        "a.mp4": None,
        "copy.mp4": None,
        "deep/b.mp4": "duplicate",
        "empty.mp4": "unreadable",
        "short.mp4": "short",
        "tall.mp4": None,
        "text.mov": "unreadable",
        "tiny.mp4": None,
        "vfr.mp4": None,
    }
    data = RecordDataset(tmp_path / "clips")
    by_file = {e["key"].split("@")[0]: e for e in data}
    assert sorted(by_file) == [f for f, reason in reasons.items() if reason is None]
    assert by_file["a.mp4"]["caption"] == "with a click"
    assert by_file["tall.mp4"]["caption"] == ""
    sounds = [by_file[f]["has_audio"] for f in ("a.mp4", "tall.mp4")]
    assert sounds == [True, False]
    for name, example in by_file.items():
        clip = decode_clip(
            example["video"], frames=5, fps=8, height=32, width=48, audio_rate=16000
        )
        first = {"a": 1, "c": 2, "ta": 3, "ti": 5, "v": 6}
        first = next(k for start, k in first.items() if name.startswith(start))
        wanted = np.arange(first, first + 5)
        if name == "vfr.mp4":  # three frames are missing; the nearest ones stand in
            wanted = first + np.array([0, 1, 1, 1, 6])
        assert numbers(clip["video"]) == wanted.tolist()
        if example["has_audio"]:
            peak = np.abs(clip["audio"][:, 0]).argmax() / 16000
            assert abs(peak - 0.25) < 3e-3
        assert json.loads(example["meta"])["file"] == name
    text = (data.path / "report.md").read_text()
    assert all(name in text for name in reasons) and "enlarged 2.00x" in text
    source = tfds.data_source("clips", split="train", data_dir=tmp_path)
    assert len(source) == len(data)
    # Finished is finished: the report is read, no file is.
    again = ingest(
        [folder], tmp_path / "clips", RECIPE, shard_size=3, work=lambda item, recipe: []
    )
    assert again.files == report.files


def test_a_decoder_that_dies_or_hangs_costs_only_its_file(folder, tmp_path):
    names = ["ok1", "segv", "ok2", "hang", "leave", "raise", "ok3"]
    for k, name in enumerate(names):
        write(tmp_path / "in" / f"{name}.mp4", k)
    report = ingest(
        [tmp_path / "in"],
        tmp_path / "clips",
        RECIPE,
        workers=2,
        timeout=3,
        work=ingest_work.nasty,
    )
    found = {Path(e["file"]).stem: (e["reason"], e["detail"]) for e in report.files}
    assert found["segv"] == ("crash", "killed by SIGSEGV")
    assert found["leave"] == ("crash", "exit status 3")
    assert found["hang"] == ("timeout", "3 s")
    assert found["raise"][0] == "failed" and "unforeseen" in found["raise"][1]
    keys = RecordDataset(tmp_path / "clips").index["key"]
    assert [k.split("@")[0] for k in keys] == ["ok1.mp4", "ok2.mp4", "ok3.mp4"]


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in path.read_text().split()] if path.exists() else []


def await_end(pids):
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive the process they serve"
        time.sleep(0.05)


def test_workers_import_little():
    """Least of all JAX: a worker must not take an accelerator."""
    script = (
        "import sys, jvdit.data.ingest.clip_file, jvdit.data.ingest.supervisor\n"
        "assert not {'jax', 'tensorflow_datasets', 'grain'} & set(sys.modules)"
    )
    paths = os.environ | {"PYTHONPATH": str(HERE.parent)}
    subprocess.run([sys.executable, "-c", script], env=paths, check=True)


def test_a_worker_that_hangs_dies_with_its_parent(tmp_path):
    (tmp_path / "job.py").write_text(
        "import ingest_work\n"
        "from jvdit.data.ingest.supervisor import supervise\n"
        "if __name__ == '__main__':\n"
        "    for event in supervise(ingest_work.count, [-2], workers=1, timeout=60):\n"
        "        print(event.kind, flush=True)\n"
    )
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    with subprocess.Popen(
        [sys.executable, tmp_path / "job.py"],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    ) as job:
        assert job.stdout.readline() == b"result\n"
        workers = children_of(job.pid)
        job.kill()
    await_end(workers)


def test_killed_and_resumed_it_is_the_same_to_the_byte(tmp_path):
    for k in range(12):
        write(tmp_path / "in" / f"{k}.mp4", k, sound=clicks((0.1,), 2))
    script = (
        "import sys, ingest_work\n"
        "from test_ingest import RECIPE, ingest\n"
        "if __name__ == '__main__':\n"
        "    ingest([sys.argv[1]], sys.argv[2], RECIPE, workers=2, shard_size=2,\n"
        "           val_fraction=0.3, work=ingest_work.slow)\n"
    )
    (tmp_path / "job.py").write_text(script)
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    out = tmp_path / "killed" / "clips"
    command = [sys.executable, tmp_path / "job.py", tmp_path / "in", out]
    job = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
    work = out / "1.0.0" / "_work"
    try:
        deadline = time.monotonic() + 40
        while not list(work.glob("train-?????.json")):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = children_of(job.pid)
        assert len(workers) >= 2
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    done = {f.name for f in work.glob("*-?????.json")}
    assert not (out / "1.0.0" / "manifest.json").exists()
    await_end(workers)
    with pytest.raises(ValueError, match="unfinished"):
        RecordDataset(out)
    made = {f: f.stat().st_mtime_ns for f in out.rglob("*array_record*")}
    options = dict(workers=2, shard_size=2, val_fraction=0.3)
    ingest([tmp_path / "in"], out, RECIPE, **options)
    kept = [
        f for f, when in made.items() if f.exists() and f.stat().st_mtime_ns == when
    ]
    assert len(kept) >= len([name for name in done if name.startswith("train")]) > 0
    ingest([tmp_path / "in"], tmp_path / "whole" / "clips", RECIPE, **options)
    assert files_of(out) == files_of(tmp_path / "whole" / "clips")
    keys = [RecordDataset(out, split).index["key"] for split in ("train", "val")]
    assert sorted(np.concatenate(keys)) == sorted(f"{k}.mp4@0.000" for k in range(12))


def test_it_says_that_it_was_stopped(tmp_path):
    for k in range(6):
        write(tmp_path / "in" / f"{k}.mp4", k, count=40)
    tool = HERE.parent / "tools" / "prepare_clips.py"
    options = "--frames 5 --fps 8 --size 32x48 --windows all --workers 1".split()
    with subprocess.Popen(
        [sys.executable, tool, tmp_path / "in", "--out", tmp_path / "out", *options],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stderr=subprocess.PIPE,
        text=True,
        # Who starts the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as job:
        while not children_of(job.pid):
            time.sleep(0.02)
        job.send_signal(signal.SIGINT)
        told = job.communicate(timeout=60)[1]
    *before, last = told.splitlines()
    assert last == "prepare_clips: stopped; the same command goes on"
    assert before[-1] == "files 0/6" and "Traceback" not in told
    assert job.returncode == 130


@pytest.fixture
def interruptible():
    """Ctrl-C does what it does in a new process, whatever ran in this one before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_until_a_worker_has_what_it_begins_with(interruptible):
    ended, reached = threading.Event(), []
    # Another thread takes the signal, and Python then interrupts the main one.
    threading.Thread(target=ended.wait, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            with supervisor._without_interruption():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
                reached.append(signal.SIGINT)
    finally:
        ended.set()
    assert reached == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_events_come_in_order_and_are_complete():
    items = [3, -1, 0, 12, 1, -3, 40, 2, -2, 1]
    events = list(supervise(ingest_work.count, items, workers=3, timeout=2))
    ends = {-1: "crash", -2: "timeout", -3: "error"}
    wanted = []
    for item in items:
        wanted += [(item, "result", (item, k)) for k in range(abs(item))]
        wanted.append((item, ends.get(item, "end"), None))
    values = [e.value if e.kind == "result" else None for e in events]
    assert [(e.item, e.kind) for e in events] == [w[:2] for w in wanted]
    assert values == [w[2] for w in wanted]


def test_what_a_killed_worker_had_is_tried_once_more_alone(tmp_path):
    """Which has all its results once; killed again, it is given up."""
    times = {"first": 0, "never": 0, "once": 1, "twice": 2}
    items = [(tmp_path, *pair) for pair in times.items()]
    events = list(supervise(ingest_work.killed, items, workers=4, timeout=60))
    assert [e.item for e in events] == sorted((e.item for e in events), key=items.index)
    for item in items:
        *found, last = [e for e in events if e.item == item]
        given_up = item[2] > 1
        assert [e.value[0] for e in found] == [0, 1, 2][: 2 if given_up else 3]
        assert last.kind == ("crash" if given_up else "end")
        assert not given_up or last.value == "killed by SIGKILL, as before"
        again = [first for _, tries, first in (e.value for e in found) if tries]
        assert len(again) == (item[1] == "once") and not any(again)


def test_a_worker_that_dies_idle_is_replaced(tmp_path):
    items = [(tmp_path, 0), (tmp_path, 20)]
    events = []
    for event in supervise(ingest_work.meet, items, workers=2, timeout=30):
        if event.kind == "result" and "result" not in events:
            pids = {int(path.name) for path in tmp_path.iterdir()}
            (idle,) = pids - {event.value}
            os.kill(idle, signal.SIGKILL)
        events.append(event.kind)
    assert events == ["end", *["result"] * 20, "end"]


def test_what_a_file_holds_decides_its_split(tmp_path):
    items = []
    for k in range(200):
        path = tmp_path / f"{k}.mp4"
        path.write_text(str(k % 150))  # 50 of them are copies
        items.append(ClipFile(path.name, str(path), f"caption {k}"))
    plan = plan_shards(items, val_fraction=0.25, shard_size=7)
    split_of = {
        i.key: split for (split, _), group in plan.shards.items() for i in group
    }
    assert len(split_of) == 200
    assert all(split_of[f"{k}.mp4"] == split_of[f"{k + 150}.mp4"] for k in range(50))
    assert 0.15 < sum(s == "val" for s in split_of.values()) / 200 < 0.35
    assert max(map(len, plan.shards.values())) == 7
    renamed = [ClipFile("n" + i.key, i.path, i.caption) for i in items]
    again = plan_shards(renamed, val_fraction=0.25, shard_size=7)
    assert {i.key[1:]: s for (s, _), g in again.shards.items() for i in g} == split_of
    gone = ClipFile("gone", str(tmp_path / "gone"), "")
    twice = ClipFile("twice", items[3].path, items[3].caption)
    plan = plan_shards([*items, gone, twice], val_fraction=0, shard_size=7)
    assert [(i.key, reason) for i, reason, _ in plan.refused] == [
        ("gone", "missing"),
        ("twice", "duplicate"),
    ]


def test_all_windows_of_a_file_follow_one_another(tmp_path):
    write(tmp_path / "long.mp4", count=48)
    recipe = Recipe(**(vars(RECIPE) | {"windows": "all"}))
    report = ingest([tmp_path / "long.mp4"], tmp_path / "clips", recipe, workers=1)
    data = RecordDataset(tmp_path / "clips")
    assert report.clips == len(data) == 9
    for k, example in enumerate(data):
        clip = decode_clip(example["video"], frames=5, fps=8, height=32, width=48)
        assert numbers(clip["video"]) == [5 * k + i for i in range(5)]


def test_slow_and_uncaptioned_videos_can_be_left_out(tmp_path):
    write(tmp_path / "in/a.mp4", caption="yes")
    write(tmp_path / "in/b.mp4", 1)
    recipe = Recipe(**(vars(RECIPE) | {"require_caption": True}))
    report = ingest([tmp_path / "in"], tmp_path / "clips", recipe, workers=1)
    assert report.reasons == {"no_caption": 1}
    fast = Recipe(**(vars(RECIPE) | {"fps": 30, "frames": 13}))
    with pytest.raises(ValueError, match="None of the 2.*2 low_rate"):
        ingest([tmp_path / "in"], tmp_path / "fast", fast, workers=1)
    with pytest.raises(ValueError, match="even"):
        Recipe(sizes=((31, 48),))
    with pytest.raises(ValueError, match="windows"):
        Recipe(windows="some")


def run_tool(*arguments):
    return subprocess.run(
        [sys.executable, HERE.parent / "tools" / "prepare_clips.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )


def test_flags_of_the_tool_are_read_as_users_write_them(tmp_path):
    wrong = run_tool(tmp_path, "--out", tmp_path / "x", "--audio_rte", "0")
    assert wrong.returncode == 2 and "did you mean --audio-rate?" in wrong.stderr
    (tmp_path / "none").mkdir()
    options = (
        "--frames 5 --fps 8 --size 32x48 --audio_rate=0 --max_reject_rate 1".split()
    )
    right = run_tool(tmp_path / "none", "--out", tmp_path / "x", *options)
    assert "No video" in right.stderr


def test_command_line(folder, tmp_path):
    options = "--frames 5 --fps 8 --size 32x48 48x32 --workers 1".split()
    (tmp_path / "none").mkdir()
    empty = run_tool(tmp_path / "none", "--out", tmp_path / "x", *options)
    assert empty.returncode == 2 and empty.stderr.count("\n") == 2
    assert "No video" in empty.stderr and not (tmp_path / "x").exists()
    out = ["--out", tmp_path / "clips"]
    fine = run_tool(folder, *out, *options)
    assert fine.returncode == 0 and "5 clips of 5 files; 4 files skipped" in fine.stdout
    strict = run_tool(folder, *out, *options, "--max-reject-rate", "0.2")
    assert strict.returncode == 1 and "44%" in strict.stderr
    sizes = RecordDataset(tmp_path / "clips").index["height"]
    assert sorted(sizes.tolist()) == [32, 32, 32, 32, 48]
    other = run_tool(folder, *out, "--frames", "9")
    assert other.returncode == 2 and "frames" in other.stderr


@pytest.mark.parametrize("name", ["manifest.csv"] if CLIPS.exists() else [])
def test_real_clips(name, tmp_path):
    rows = (CLIPS / name).read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join([rows[0], *rows[3:8]]))
    recipe = Recipe(frames=9, fps=8, sizes=((64, 96),), preset="ultrafast")
    report = ingest([tmp_path / "some.csv"], tmp_path / "clips", recipe, root=CLIPS)
    assert report.clips == 5 and not report.skipped
    assert RecordDataset(tmp_path / "clips").index["has_audio"].all()
