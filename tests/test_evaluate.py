"""The evaluation from the command line: what it writes, and that it goes on."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from doors import command

from jvdit.data.world import World
from jvdit.data.world.scene import SHAPES
from jvdit.evaluation import distance, report
from jvdit.evaluation.breakdown import NAMES, breakdown
from jvdit.evaluation.oracle import COLUMNS
from jvdit.evaluation.reconstruction import temporal_error
from jvdit.training.metrics import read_history


@pytest.fixture(scope="module")
def evaluated(workdir, tmp_path_factory):
    """Arguments, and the folder that they fill."""
    out = tmp_path_factory.mktemp("evaluated")
    args = ["--workdir", workdir / "dit", "--n", 6, "--steps", "2,3", "--out", out]
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout
    return args, out


def test_the_report_compares_with_real_clips(evaluated):
    _, out = evaluated
    text = (out / "report.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert [c["steps"] for c in found["columns"]] == [2, 3] and found["clips"] == 6
    for column in found["columns"]:
        assert column["real"]["color"][0] > 0.5 > column["scores"]["all"][0]
        assert column["frechet"] > 0 and set(column["scores"]) <= set(COLUMNS)
    page = (out / "report.html").read_text()
    assert page.count("<video") == 9 and page.count("<svg") >= 2
    assert not re.search(r"""(src|href)=['"](?!data:|#)""", page), "one file, whole"


def test_a_stopped_evaluation_goes_on(evaluated):
    args, out = evaluated
    first, second = sorted((out / "clips").rglob("*.npy"))
    kept = np.load(first)
    before = second.stat().st_mtime_ns, (out / "report.json").read_text()
    first.unlink()
    assert command("evaluate", *args).returncode == 0
    assert second.stat().st_mtime_ns == before[0], "what is there is not made again"
    np.testing.assert_array_equal(np.load(first), kept)
    assert (out / "report.json").read_text() == before[1]


def test_an_autoencoder_is_measured_with_the_oracle(workdir, tmp_path):
    for size in ("7x18x16", "5x16x16"):
        data = f"world:test:{size}@8:4"
        args = "--vae", workdir / "vae", "--data", data, "--out", tmp_path
        done = command("evaluate", *args)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "report.json").read_text())
        assert ("oracle" in found) == (size == "5x16x16"), (
            "cut clips aren't the scene's"
        )
    assert found["clips"] == 4 and 5 < found["measures"]["psnr"][0] < 60
    assert found["oracle"]["real"]["color"][0] > 0.5
    assert "<video" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workdir", "nowhere"], "nowhere"),
        (["--workdir", "DIT", "--size", "15x16"], "15"),
        (["--workdir", "DIT", "--steps", "many"], "many"),
        (["--vae", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(args, message, workdir, tmp_path):
    args = [str(workdir / "dit") if a == "DIT" else a for a in args]
    done = command("evaluate", *args, "--out", tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_process_of_its_own_says_a_line_too(tmp_path):
    line = [sys.executable, "-m", "jvdit.evaluate", f"--out={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error:") and "--workdir" in done.stderr


def test_training_leaves_scores_and_their_history(workdir):
    history = read_history(workdir / "dit")
    steps = [step for step, _ in history["oracle/color"]]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert {"validation/loss", "loss", "oracle/all"} <= set(history)


def test_a_step_done_again_counts_once(tmp_path):
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "lo']
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    assert read_history(tmp_path) == {"loss": [(1, 2.0)]}
    shutil.rmtree(tmp_path)
    assert read_history(tmp_path) == {}


def test_copies_are_found_and_new_clips_are_not():
    rng = np.random.default_rng(0)
    train, other, val = (rng.normal(size=(n, 40)) for n in (300, 80, 200))
    new = distance.memorisation(other, train, val)
    assert new["copies"] < 0.1 and new["authentic"] > 0.5
    assert distance.memorisation(train[:50], train, val) == {
        "copies": 1.0,
        "authentic": 0.0,
    }


def test_the_distance_of_distributions_is_that_of_their_moments():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20_000, 3))
    assert distance.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    moved = distance.frechet_distance(a, 2 * b + [3, 0, 0])
    assert moved == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.05)


def test_temporal_error_sees_flicker_that_is_added():
    still = np.full((2, 4, 8, 8, 3), 100, np.uint8)
    flickering = still.copy()
    flickering[1, ::2] += 51
    np.testing.assert_allclose(temporal_error(flickering, still), [0, 0.2])


def test_parts_tell_where_a_score_is_lost():
    scenes = World("test").scenes(np.arange(200))
    crosses = (scenes.count == 1) & (scenes.shape[:, 0] == SHAPES.index("cross"))
    right = np.where(crosses | (scenes.count == 3), 0.0, 1.0)
    parts = breakdown({name: right for name in NAMES}, scenes)
    assert parts["3 objects"]["all"] == parts["a cross"]["shape"] == 0
    assert parts["2 objects"]["all"] == parts["a circle"]["all"] == 1
    assert 0.6 < parts["1 object"]["all"] < 0.95
    assert sum(parts[f"{n} object{'s' * (n > 1)}"]["clips"] for n in (1, 2, 3)) == 200
    page = report.parts_table(parts, parts)
    assert "a cross" in page and "0.00 <small>0.00" in page


def test_numbers_and_missing_ones():
    assert report.number((0.5, 0.4, 0.6)).startswith("0.500")
    assert report.number((float("nan"),) * 3) == "–"
    page = report.page("a < b", [report.section("c & d")])
    assert "a &lt; b" in page and "c &amp; d" in page
