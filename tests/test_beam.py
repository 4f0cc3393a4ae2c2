"""Apache Beam makes the data set of local workers, to the byte; kills cost nothing.

Runs where `jvdit[beam]` is installed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ingest_work
import numpy as np
import pytest

from jvdit.data.ingest.beam import beam_engine
from jvdit.data.ingest.clip_file import Recipe
from jvdit.data.ingest.ingest import ingest
from jvdit.data.media.writer import encode_clip
from jvdit.data.records import RecordDataset

TOOL = Path(__file__).parent.parent / "tools" / "prepare_clips.py"
RECIPE = Recipe(
    frames=5,
    fps=8.0,
    sizes=((32, 48),),
    windows="all",
    audio_rate=0,
    preset="ultrafast",
)
OPTIONS = "--frames 5 --fps 8 --size 32x48 --windows all --audio-rate 0".split()
OPTIONS += "--preset ultrafast --shard-size 2 --val 0.3".split()
RUNNERS = {
    "threads": ["--runner=DirectRunner"],
    "processes": [
        "--runner=DirectRunner",
        "--direct_running_mode=multi_processing",
        "--direct_num_workers=2",
    ],
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve clips, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 48, 64, 3))
    for k, video in enumerate(noise.astype(np.uint8)):
        encode_clip(folder / f"{k:02}.mp4", video, 8)
        (folder / f"{k:02}.txt").write_text(f"number {k}")
    (folder / "bad.mp4").write_text("no video")
    return folder


def files_of(path):
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def local(videos, tmp_path_factory):
    """What local workers make of them."""
    out = tmp_path_factory.mktemp("local") / "clips"
    ingest([videos], out, RECIPE, workers=2, shard_size=2, val_fraction=0.3)
    return files_of(out)


def job(videos, out, runner):
    line = [sys.executable, TOOL, videos, "--out", out, *OPTIONS, *RUNNERS[runner]]
    paths = os.environ | {"PYTHONPATH": str(TOOL.parent.parent)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(line, env=paths, start_new_session=True, **quiet)


@pytest.mark.parametrize("runner", RUNNERS)
def test_killed_and_restarted_it_is_the_local_data_set(videos, local, tmp_path, runner):
    pytest.importorskip("apache_beam")
    out = tmp_path / "clips"
    first = job(videos, out, runner)
    deadline, done = time.monotonic() + 120, []
    while len(done) < 2:
        assert time.monotonic() < deadline and first.poll() is None
        done = [*out.glob("*/_work/train-*.json")]
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not [*out.glob("*/manifest.json")]
    done = {file: file.stat().st_mtime_ns for file in out.glob("*/clips-*")}
    assert job(videos, out, runner).wait(timeout=120) == 0
    assert files_of(out) == local
    assert all(file.stat().st_mtime_ns == at for file, at in done.items())
    keys = [record["key"] for record in RecordDataset(out)]
    assert len(set(keys)) == len(keys)


def test_what_kills_a_decoder_costs_only_its_file(tmp_path):
    pytest.importorskip("apache_beam")
    video = np.random.default_rng(0).integers(0, 255, (3, 12, 48, 64, 3))
    for name, clip in zip(("ok1", "segv", "ok2"), video.astype(np.uint8), strict=True):
        (tmp_path / "in").mkdir(exist_ok=True)
        encode_clip(tmp_path / "in" / f"{name}.mp4", clip, 8)
    engine = beam_engine(RUNNERS["threads"])
    report = ingest(
        [tmp_path / "in"],
        tmp_path / "clips",
        RECIPE,
        engine=engine,
        shard_size=1,
        work=ingest_work.nasty,
    )
    found = {entry["file"]: entry["reason"] for entry in report.files}
    assert found == {"ok1.mp4": None, "ok2.mp4": None, "segv.mp4": "crash"}


def test_an_engine_that_writes_elsewhere_is_told(videos, tmp_path):
    def lost(work, jobs):
        for each in jobs[1:]:
            work(each)

    options = dict(engine=lost, shard_size=4)
    with pytest.raises(
        ValueError, match="1 of 4 shards aren't in .*mount at one place"
    ):
        ingest([videos], tmp_path / "clips", RECIPE, **options)

    def blind(work, jobs):
        for each in jobs:
            work(each._replace(path=str(tmp_path / "other/1.0.0")))

    with pytest.raises(ValueError, match="a worker finds no data set at .*other"):
        ingest([videos], tmp_path / "clips", RECIPE, **options | {"engine": blind})
    assert not (tmp_path / "other").exists()

    def whole(work, jobs):
        assert len(jobs) == 1  # the others are done
        json.dumps([jobs[0].plan.settings, jobs[0].plan.shards])
        work(jobs[0])
        work(jobs[0])

    report = ingest([videos], tmp_path / "clips", RECIPE, **options | {"engine": whole})
    assert report.clips == 36 and len(report.skipped) == 1


def test_options_are_beams_own():
    pytest.importorskip("apache_beam")
    with pytest.raises(ValueError, match="'--framse=9' is an option neither"):
        beam_engine(["--runner=DirectRunner", "--framse=9"])


def test_without_beam_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"needs Apache Beam .*'jvdit\[beam\]'"):
        beam_engine(["--runner=DirectRunner"])
