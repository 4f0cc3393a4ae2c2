"""The report on an audio autoencoder: what it measures, hears and shows."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from doors import command

from jvdit.data.sources import ArraySource
from jvdit.data.world import World
from jvdit.evaluation import report, sound_report
from jvdit.generation.reconstructor import SoundReconstructor
from jvdit.models.audio_vae import VARIANTS, AudioVAE
from jvdit.weights.parameters import Network

WORLD = "world:single:17x32x32@8:12:1"
CONTROLS = {"silence", "60 ms late", "another clip's"}


def reported(out, run, name=WORLD, sound=(16_000, 1), count=12):
    """What report.json and report.html hold of a reconstruction by a function."""
    paths = sound_report.report_audio_vae("x", run, sound, name, count, out)
    return json.loads(paths[0].read_text()), paths[1].read_text()


def test_a_perfect_one_is_as_the_real_and_wrong_sounds_are_not(tmp_path):
    found, page = reported(tmp_path, lambda audio: audio)
    assert found["measures"]["si_sdr"] == pytest.approx([100.0] * 3)
    assert found["measures"]["log_mel"] == pytest.approx([0.0] * 3)
    scores = found["oracle"]
    assert scores.keys() == {"real", "reconstructed", "of another material"} | CONTROLS
    assert scores["reconstructed"] == scores["real"]
    assert scores["real"]["sync_40ms"][0] > 0.8 and scores["real"]["material"][0] > 0.8
    for who in CONTROLS:
        assert scores[who]["sync_40ms"][0] < scores["real"]["sync_40ms"][0] - 0.5
    other = scores["of another material"]
    assert other["material"][0] < 0.1
    assert other["sync_40ms"] == scores["real"]["sync_40ms"]
    assert scores["60 ms late"]["lag"][0] == pytest.approx(0.06, abs=0.011)
    # Nine examples, each with two players and a picture of both spectrograms.
    assert page.count("<video class=heard") == 18 and page.count("<img") == 9
    assert not re.search(r"""(src|href)=['"](?!data:|#)""", page), "one file, whole"


def test_what_a_reconstruction_loses_is_heard(tmp_path):
    found, _ = reported(tmp_path, lambda audio: np.roll(audio, 1600, axis=0))
    scores = found["oracle"]
    assert found["measures"]["si_sdr"][0] < 0 < 1 < found["measures"]["log_mel"][0]
    late, real = scores["reconstructed"], scores["real"]
    assert late["sync_40ms"][0] < 0.4 < 0.8 < real["sync_40ms"][0]
    assert late["lag"][0] > 0.08 > 0.02 > real["lag"][0]


def test_clips_without_sound_are_named_and_their_pictures_not_judged(
    tmp_path, monkeypatch
):
    clips = World("single", frames=4, height=16, width=16).clips(np.arange(4))
    loud = 0.1 * np.sin(np.arange(8000, dtype=np.float32))[:, None].repeat(2, 1)
    listed = [
        {"video": video, "fps": 8.0, "caption": "", "audio": audio, "has_audio": whole}
        for video, audio, whole in zip(
            clips["video"],
            [loud, None, loud, 0 * loud],
            [True, True, False, True],
            strict=True,
        )
    ]
    source = ArraySource(listed)
    monkeypatch.setattr(sound_report, "open_source", lambda name, audio_rate: source)
    shapes = []

    def run(audio):
        shapes.append(audio.shape)
        return audio

    found, page = reported(tmp_path, run, "mine")
    assert shapes == [(8000, 1)] * 2, "mixed down"
    assert [bad["clip"] for bad in found["bad"]] == [1, 2] and found["clips"] == 2
    assert "oracle" not in found and found["measures"]["si_sdr"][0] > 99
    assert page.count("<img") == 3, "the silent clip has no measure to be ordered by"
    monkeypatch.setattr(
        sound_report, "open_source", lambda name, audio_rate: ArraySource(listed[1:2])
    )
    with pytest.raises(ValueError, match="none of the 1 clips of mine.*missing"):
        reported(tmp_path, run, "mine")


def test_examples_leave_out_what_has_no_measure():
    found = report.examples(np.array([np.nan, 1.0, 3.0, np.nan, 2.0]), count=1)
    assert {name: list(ids) for name, ids in found.items()} == {
        "Best": [2],
        "Median": [4],
        "Worst": [1],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir with an autoencoder that was never trained, which divides by 12."""
    place = tmp_path_factory.mktemp("sound")
    vae = AudioVAE(**VARIANTS["tiny"], sample_rate=8000, latents_std=(2.0,) * 4)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 12, 1)))["params"]
    Network(vae, params).save(place / "model/vae")
    return place


def test_the_command_reports_on_a_folder(folder, tmp_path):
    args = "--audio_vae", folder, "--data", "world:test:4x16x16@8:2", "--out", tmp_path
    done = command("evaluate", *args)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["clips"] == 2 and found["vae"] == str(folder)
    assert np.isfinite(found["measures"]["log_mel"]).all()
    run = SoundReconstructor(folder)
    sound = np.random.default_rng(0).normal(0, 0.1, (131, 1)).astype(np.float32)
    decoded, _, _ = jax.jit(run.vae.apply)({"params": run._params}, sound[None])
    assert_close(run(sound), decoded[0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--audio_vae", "nowhere"], "nowhere"),
        (["--audio_vae", "a", "--vae", "b"], "one of them"),
        (["--audio_vae", "FOLDER", "--data", "world:test:3x16x16@8:2"], "3 frames"),
    ],
)
def test_mistakes_are_told_in_one_line(args, message, folder, tmp_path):
    args = [str(folder) if a == "FOLDER" else a for a in args]
    done = command("evaluate", *args, "--out", tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error:")
    assert not any(tmp_path.iterdir())
