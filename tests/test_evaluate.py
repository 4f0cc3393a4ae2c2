"""The evaluation from the command line: what it writes, and that it goes on."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from doors import command
from safetensors.numpy import save_file

from jvdit.data.world import World
from jvdit.data.world.scene import SHAPES
from jvdit.evaluation import distance, report
from jvdit.evaluation.breakdown import NAMES, breakdown, composition
from jvdit.evaluation.measuring import met_in_training, neighbours, trained_on
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
    size = {k: found["columns"][0]["world"][k] for k in ("frames", "height", "width")}
    prompts = World("test", 1, **size).captions(np.arange(6))
    assert [c["steps"] for c in found["columns"]] == [2, 3] and found["clips"] == 6
    for column in found["columns"]:
        assert column["real"]["color"][0] > 0.5 > column["scores"]["all"][0]
        assert column["sets"]["clips"]["frechet"] > 0
        assert set(column["scores"]) <= set(COLUMNS)
        assert column["met_in_training"] is not None, "the model says what it learned"
        assert [clip["prompt"] for clip in column["clips"]] == prompts
        assert {"all", "speed", "light"} <= set(column["clips"][0])
        right = column["confusions"]["shape"]
        assert len(right["told_seen"]) == len(right["words"]) == len(SHAPES)
    page = (out / "report.html").read_text()
    assert page.count("<video") == 9 and page.count("<svg") >= 2
    assert not re.search(r"""(src|href)=['"](?!data:|#)""", page), "one file, whole"


def test_a_stopped_evaluation_goes_on(evaluated):
    args, out = evaluated
    first, second = sorted((out / "clips").rglob("*.npz"))
    kept = np.load(first)
    before = second.stat().st_mtime_ns, (out / "report.json").read_text()
    first.unlink()
    assert command("evaluate", *args).returncode == 0
    assert second.stat().st_mtime_ns == before[0], "what is there is not made again"
    np.testing.assert_array_equal(np.load(first), kept)
    texts = before[1], (out / "report.json").read_text()
    again = [re.sub('"(idle_)?joules": .*', "", text) for text in texts]
    assert again[0] == again[1] and "joules" in texts[0]


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


def test_a_model_of_ones_own_clips_is_compared_with_held_out_ones(
    workdir, features, tmp_path
):
    data = "world:val:5x18x16@8:5"
    args = "--workdir", workdir / "dit", "--data", data, "--steps", 2, "--out", tmp_path
    done = command("evaluate", *args, "--features", features, "--n", 4)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["clips"] == 4 and found["bad"] == []
    for name in ("random filters", "your features"):
        distances = found["frechet_distance"][name]
        assert set(distances) == {"generated", "reconstructed", "real"}
        assert distances["generated"] > 0
    losses = found["held_out_loss"]
    assert losses["loss"]["step"] == 8 and "t=0.5" in losses
    assert 5 < found["reconstruction"]["psnr"][0] < 60
    assert (tmp_path / "report.html").read_text().count("<video") == 4


@pytest.fixture
def features(tmp_path):
    """A network of the user's own."""
    rng, tensors = np.random.default_rng(0), {}
    for scale, sizes in enumerate(((3, 4), (4, 5))):
        name = f"scale_{scale}.conv_0"
        tensors[f"{name}.kernel"] = rng.normal(size=(3, 3, *sizes)).astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(sizes[1], np.float32)
    folder = tmp_path / "features"
    folder.mkdir()
    save_file(tensors, folder / "network.safetensors")
    return folder


def test_a_model_of_other_clips_needs_some_of_them(workdir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(workdir / "dit" / "model", model)
    settings = json.loads((model / "generator.json").read_text())
    settings["sources"] = ["data/clips"]
    (model / "generator.json").write_text(json.dumps(settings))
    done = command("evaluate", "--workdir", model)
    assert done.returncode == 1 and "data/clips#val" in done.stderr
    assert not (model / "evaluation").exists()
    for args, told in (
        (["--data", "world:val:5x16x16@8:4", "--steps", "2,3"], "one setting"),
        (["--features", "nowhere"], "give both"),
    ):
        done = command("evaluate", "--workdir", workdir / "dit", *args)
        assert done.returncode == 1 and told in done.stderr


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
    new = distance.memorisation(other[:, None], train, val[:, None])
    assert new["copies"] < 0.1 and new["authentic"] > 0.5
    assert distance.memorisation(train[:50, None], train, val[:, None]) == {
        "copies": 1.0,
        "authentic": 0.0,
    }


@pytest.mark.parametrize(
    "hide",
    [
        lambda x: x,
        lambda x: x[:, :, :, ::-1],
        lambda x: np.roll(x, 2, 3),
        lambda x: (0.6 * x).astype(np.uint8),
        lambda x: np.concatenate([x[:, 1:], x[:, -1:]], 1),
    ],
    ids=["as it is", "mirrored", "moved", "dimmed", "a frame later"],
)
def test_copies_are_found_however_they_are_hidden(hide):
    world = World("single", 0, 9, 32, 32)
    own, new = world.videos(np.arange(64)), World("single", 5, 9, 32, 32)
    known, held_out = neighbours(dataclasses.replace(world, seed=5), [(world, 512)])
    copies = distance.memorisation(distance.variants(hide(own)), known, held_out)
    assert copies["copies"] > 0.9
    videos = distance.variants(new.videos(np.arange(64)))
    assert distance.memorisation(videos, known, held_out)["copies"] < 0.1


def test_the_distance_sees_the_order_of_frames():
    world = World("val", 0, 9, 32, 32)
    features = distance.random_features(world.videos(np.arange(256)))
    other = world.videos(np.arange(256, 512))
    order = np.random.RandomState(0).permutation(9)
    near, far = (
        distance.frechet_distance(features, distance.random_features(x))
        for x in (other, other[:, order])
    )
    assert far > 3 * near


def test_prompts_of_the_training_are_known():
    world = World("single", 0, 9, 32, 32)
    prompts = world.captions(np.arange(8)) + ["a cat"]
    met = met_in_training(prompts, [(world, 4)])
    assert met[:4].all() and not met[-1]
    assert trained_on(["world:single:9x32x32@8:4", "clips", ""]) == [(world, 4)]


def test_composition_compares_like_with_like():
    known, new = (World(s).scenes(np.arange(200)) for s in ("test", "comp"))
    of_shape = {
        name: np.where(x.shape[:, 0] == 2, 0.2, 0.8)
        for name, x in (("test", known), ("comp", new))
    }
    assert composition(of_shape["comp"], new, of_shape["test"], known) == pytest.approx(
        0
    )
    worse = of_shape["comp"] - 0.1
    assert composition(worse, new, of_shape["test"], known) == pytest.approx(-0.1)


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
