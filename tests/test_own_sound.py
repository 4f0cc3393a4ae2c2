"""The sound of a model of one's own clips: what agrees with real sound, what not."""

import json

import numpy as np
import pytest
from doors import command

from jvdit.box import FOLDER
from jvdit.data.sources import ArraySource
from jvdit.data.world import World
from jvdit.evaluation.own_sound import Sounds, agreement, sound_distances
from jvdit.generation import own_clips
from jvdit.generation.generator import Generator
from jvdit.generation.world_clips import Setting

RATE = 16_000


@pytest.fixture(scope="module")
def real():
    """Sounds of clips of the world, in which something bounces."""
    world = World("single", 1, 17, 32, 32, fps=8.0, audio_rate=RATE)
    return list(world.clips(np.arange(8))["audio"])


def test_a_perfect_sound_agrees_and_wrong_ones_do_not(real):
    clips = [Sounds(x, 0.5 * x, x[::-1], x, RATE) for x in real]
    found = agreement(clips)
    perfect = found["made for its picture"]
    assert perfect["onsets_40ms"][0] == 1.0 and perfect["log_mel"][0] == 0.0
    assert perfect["loudness"][0] == pytest.approx(1.0)
    softer = found["reconstructed"]
    assert softer["onsets_40ms"][0] > 0.95, "a softer sound has the same onsets"
    assert softer["log_mel"][0] > 1.0
    for name in ("60 ms late", "another clip's", "silence"):
        assert found[name]["onsets_40ms"][0] < 0.5
        assert found[name]["loudness"][0] < 0.7
    distances = sound_distances(clips)
    assert 0 < distances["generated"] < distances["real"], "reversed, of equal levels"


def test_what_was_made_for_some_pictures_is_measured_of_those(real):
    clips = [
        Sounds(x, x, x, y, RATE)
        for x, y in zip(real, [real[0], *[None] * 7], strict=True)
    ]
    assert agreement(clips)["made for its picture"]["onsets_40ms"] == (1.0, 1.0, 1.0)
    silent = [clip._replace(followed=None) for clip in clips]
    assert "made for its picture" not in agreement(silent)


def test_the_box_is_compared_with_clips_that_sound(tmp_path):
    data = "world:single:9x32x32@8:4:1"
    args = "--workdir", FOLDER, "--data", data, "--steps", 2, "--out", tmp_path
    done = command("evaluate", *args, "--nodraft", "--n", 4)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["sound"]["clips"] == 4
    agreed = found["sound"]["agreement"]
    assert agreed["reconstructed"]["onsets_40ms"][0] > 0.8
    assert agreed["silence"]["onsets_40ms"][0] == 0.0
    assert "made for its picture" in agreed
    assert "levels of the sound" in found["frechet_distance"]
    # Four figures: the clip, what is generated, and the clip with a sound made for it.
    assert (tmp_path / "report.html").read_text().count("<video class=heard") == 12


def test_a_clip_without_sound_is_compared_by_its_picture_alone(monkeypatch):
    world = World("single", 1, 9, 32, 32, fps=8.0, audio_rate=RATE)
    clips, captions = world.clips(np.arange(2)), world.captions(np.arange(2))
    sounds = [clips["audio"][0], None]
    source = ArraySource(
        [
            {
                "video": x,
                "fps": 8.0,
                "caption": c,
                "audio": y,
                "has_audio": y is not None,
            }
            for x, c, y in zip(clips["video"], captions, sounds, strict=True)
        ]
    )
    monkeypatch.setattr(own_clips, "open_source", lambda name, audio_rate: source)
    setting = Setting(1, 1.0, "euler", False)
    pairs, made, heard = own_clips.counterparts(
        Generator.load(FOLDER), "mine", 2, setting, 8
    )
    assert len(pairs.good) == len(made) == 2 and heard[1] is None
    np.testing.assert_array_equal(heard[0].real, sounds[0])
    for sound in heard[0][1:4]:
        assert sound.shape == sounds[0].shape
