"""Clips with sound, the whole way: trained, sampled, given one kind, evaluated."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import thread_config
from doors import command

from jvdit import config as defaults
from jvdit.data.media.audio import read_sound
from jvdit.data.media.reader import decode_clip
from jvdit.data.sources import open_source
from jvdit.data.world import World
from jvdit.diffusion.denoise import Guidance
from jvdit.generation.films import Film, make_film
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.settings import Settings
from jvdit.serving.packed import Packed
from jvdit.tasks.loop import train
from jvdit.tasks.stages import run
from jvdit.training.metrics import read_history

SETTINGS = {"steps": 2, "solver": "euler"}
RATE = 8000
SIZE = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}


def config(workdir):
    """An audio autoencoder, latents of both kinds, and a network of both."""
    audio = thread_config.intervals(defaults.audio_vae("tiny"), 2)
    audio.vae.update(strides=(4, 8), patch_size=16, sample_rate=RATE)
    audio.data.sources = ("world:train:5x16x16@8:1000",)
    audio.data.validation = "world:val:5x16x16@8:2"
    audio.data.sample_budget = 8 * 5000
    latents = defaults.encode(
        "world:train:5x16x16@8:32",
        f"{workdir}/vae",
        "world:val:5x16x16@8:8",
        audio_vae="{workdir}/audio",
    )
    dit = thread_config.get_config().stages.dit
    dit.data.sound_budget = 20
    dit.pairings = {"together": 1.0, "picture_to_sound": 1.0, "sound_to_picture": 1.0}
    dit.given.inpaint_sound = 0.3
    dit.cut = 0.5
    dit.steps = dit.evaluate_every = dit.sample_every = 4
    dit.sample.prompts = dit.sample.prompts[:1]
    return defaults.stages(audio=audio, latents=latents, dit=dit)


@pytest.fixture(scope="module")
def heard(latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heard")
    run(config(latents), str(folder))
    return folder


@pytest.fixture(scope="module")
def generator(heard):
    """Of a network that isn't as good as new, so that all it sees matters."""
    model = Generator.load(heard / "dit").model
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32),
        model.networks["dit"].params,
    )
    return Generator(model.with_params({"dit": params}))


def request(**fields):
    return Request("one object", **(SIZE | fields))


def test_a_training_with_sound_tells_of_both_kinds(heard):
    found = read_history(heard / "dit")
    for name in ("picture_loss", "sound_loss", "validation/sound_loss"):
        assert name in found, [*found]
    assert any("sound_loss_at_t" in name for name in found)
    assert any(name.startswith("oracle/sync") for name in found)
    sheet = heard / "audio" / "samples"
    assert list(sheet.glob("*.png"))
    source = open_source(f"{heard}/latents")
    clip = source.read([3])[0]
    # 5000 samples in latents of 512.
    assert clip["sound_mean"].shape == (10, 4) and source.index["sounds"][3] == 10
    assert (open_source(f"{heard}/latents#train:1").index["sounds"] == 0).all()


def test_a_clip_is_the_same_whatever_else_is_made_with_it(generator):
    alone = generator(request(seed=3), **SETTINGS)
    other = request(seed=4, frames=9)
    mute = request(seed=5, sound=False)
    among = generator([other, mute, request(seed=3)], **SETTINGS)
    assert alone.audio_rate == RATE and alone.audio.shape == (5000, 1)
    assert among[0].audio.shape == (9000, 1) and among[1].audio is None
    np.testing.assert_allclose(among[2].video, alone.video, atol=1)
    np.testing.assert_allclose(among[2].audio, alone.audio, atol=1e-4)
    silent = generator(mute, **SETTINGS)
    np.testing.assert_allclose(silent.video, among[1].video, atol=1)
    picture = generator(request(frames=1), **SETTINGS)
    assert picture.audio is None


def test_what_is_given_is_kept_and_makes_a_difference(generator):
    world = World("val", 0, **SIZE, audio_rate=RATE)
    clips = world.clips(np.arange(2))
    found = []
    for i in range(2):
        made = generator(request(from_video=clips["video"][i]), **SETTINGS)
        np.testing.assert_array_equal(made.video, clips["video"][i])
        found.append(made.audio)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    made = generator(request(from_sound=clips["audio"][0]), **SETTINGS)
    np.testing.assert_array_equal(made.audio, clips["audio"][0])
    drafted = generator(request(from_sound=made.audio), draft=True, **SETTINGS)
    np.testing.assert_array_equal(drafted.audio, made.audio)
    plain = generator(request(), **SETTINGS)
    assert np.abs(made.video.astype(int) - plain.video).max() > 0


def test_parts_of_a_sound_are_kept_and_the_rest_is_made(generator):
    """With any picture, and with one that is given; what is kept makes a difference."""
    world = World("val", 0, **SIZE, audio_rate=RATE)
    clips = world.clips(np.arange(2))
    rate, video, (audio, other) = RATE, clips["video"][0], clips["audio"]
    other = 0.3 * np.random.default_rng(0).normal(size=other.shape).astype(np.float32)
    keep = {"keep_sound": ((0.0, 0.2), (0.4, 0.56))}
    for more in ({}, {"from_video": video}):
        made, loud = (
            generator(request(from_sound=x, **keep, **more), **SETTINGS).audio
            for x in (audio, other)
        )
        for sound, given in ((made, audio), (loud, other)):
            assert sound.shape == (5000, 1)
            for first, last in keep["keep_sound"]:
                span = slice(round(first * rate), round(last * rate))
                np.testing.assert_array_equal(sound[span], given[span])
            middle = slice(round(0.21 * rate), round(0.39 * rate))
            assert np.abs(sound[middle] - given[middle]).max() > 1e-3
        assert np.abs(made[middle] - loud[middle]).max() > 1e-3
    with pytest.raises(ValueError, match="`keep_sound` 0.5:2 goes beyond the end"):
        generator(request(from_sound=audio, keep_sound=((0.5, 2.0),)), **SETTINGS)
    draft = generator(request(from_sound=audio, **keep), draft=True, **SETTINGS)
    np.testing.assert_array_equal(draft.audio[:1600], audio[:1600])


def test_sound_may_come_after_its_picture(generator):
    plain = request(seed=2)
    found = generator(plain, sound_after=True, draft=True, **SETTINGS)
    mute = dataclasses.replace(plain, sound=False)
    picture = generator(mute, draft=True, **SETTINGS).video
    np.testing.assert_array_equal(found.video, picture)
    given = dataclasses.replace(plain, from_video=picture)
    want = generator(given, **SETTINGS)
    np.testing.assert_allclose(found.audio, want.audio, atol=1e-5)


def test_clips_with_sound_are_packed_while_others_run(generator, heard):
    """One that is silent, one that is heard, and one of whose kinds each is given."""
    packed = Packed(generator, tokens=64, rows=2, clips=3, steps=6)
    assert packed.takes(packed.settings) and packed.shape.sounds > 0
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    audio = rng.normal(size=(5000, 1)).astype(np.float32) / 5
    orders = [
        (request(seed=1, sound=False), 3, 1.5),
        (request(seed=2), 4, 3.0),
        (request(seed=3, from_video=video), 5, 2.0),
        (request(seed=4, from_sound=audio), 2, 1.0),
    ]
    found, running, waiting = {}, {}, [*range(len(orders))]
    while waiting or running:
        if waiting:  # one more before every step
            i = waiting.pop(0)
            asked, steps, scale = orders[i]
            asked = generator.complete(asked)
            how = {"steps": steps, "guidance_scale": scale}
            how = dataclasses.replace(packed.settings, **how)
            slot = packed.find(packed.counts(asked))
            running[i] = packed.enter(asked, how, slot), asked, how
        for clip in packed.step():
            (i,) = [i for i, (other, *_) in running.items() if other is clip]
            found[i] = packed.latents(clip)
            packed.leave(clip)
            _, asked, how = running.pop(i)
            (alone,) = generator.solve([asked], **how.solving)
            np.testing.assert_allclose(found[i].picture, alone[0].picture, atol=1e-3)
            assert (found[i].sound is None) == (alone[0].sound is None)
            if alone[0].sound is not None:
                np.testing.assert_allclose(found[i].sound, alone[0].sound, atol=1e-3)
    assert found[0].sound is None and len(found) == 4


def test_guidance_is_of_each_kind(generator):
    """A scale of one kind changes that kind from the first step on."""
    ways = {
        "plain": Guidance(1.0),
        "sound": Guidance(1.0, sound_scale=3.0),
        "step": Guidance(1.0, sync=(1.0, 4.0)),
        "none": Guidance(1.0, sync=(1.0, 1.0 + 1e-7)),
    }
    made = {}
    for name, guidance in ways.items():
        (found,) = generator.solve(
            [request()], steps=1, solver="euler", guidance=guidance
        )
        made[name] = found[0]
    for name in ("sound", "step"):
        np.testing.assert_allclose(made[name].picture, made["plain"].picture, atol=1e-5)
        assert np.abs(made[name].sound - made["plain"].sound).max() > 1e-3, name
    np.testing.assert_allclose(made["none"].sound, made["plain"].sound, atol=1e-4)


def test_a_model_with_sound_is_saved_whole(generator, tmp_path):
    generator.save(tmp_path / "model")
    again = Generator.load(tmp_path / "model")
    clips = [x(request(seed=1), **SETTINGS) for x in (again, generator)]
    np.testing.assert_array_equal(clips[0].audio, clips[1].audio)


def test_the_command_writes_sound_and_takes_it(heard, tmp_path):
    model = f"--workdir={heard}/dit"
    args = ("sample", model, "--steps=2", f"--out={tmp_path}")
    done = command(*args, "a thing")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "a-thing_0.mp4"
    assert abs(len(read_sound(file, RATE)) - 5000) <= 1024
    done = command(*args, "--from_sound", str(file), "--frames=5", "given")
    assert done.returncode == 0, done.stderr
    done = command(*args, "--from_video", str(file), "kept")
    assert done.returncode == 0, done.stderr
    how = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}
    first, second = (
        decode_clip(str(x), **how)["video"] for x in (file, tmp_path / "kept_0.mp4")
    )
    assert np.abs(first.astype(int) - second).mean() < 8
    assert command(*args, "--nosound", "quiet").returncode == 0
    with pytest.raises(ValueError, match="no sound"):
        read_sound(tmp_path / "quiet_0.mp4", RATE)


def test_what_cannot_be_is_told(generator, heard):
    sound = np.zeros((5000, 1), np.float32)
    for fields, message in (
        ({"from_sound": sound[:3000]}, "lasts 0.38 s and the clip 0.62 s"),
        ({"from_sound": np.zeros((5000, 3), np.float32)}, r"\[a e\]"),
        ({"from_sound": sound, "sound": False}, "`sound` is False"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(request(**fields), **SETTINGS)
    with pytest.raises(FileNotFoundError, match="nowhere.wav"):
        generator(request(from_sound="nowhere.wav"), **SETTINGS)
    model = dataclasses.replace(generator.model, conditions=())
    with pytest.raises(ValueError, match="`from_sound` was given, but"):
        Generator(model)(request(from_sound=sound), **SETTINGS)
    networks = {k: v for k, v in model.networks.items() if k != "audio_vae"}
    silent = Generator(dataclasses.replace(model, networks=networks))
    with pytest.raises(ValueError, match="has no sound"):
        silent(request(sound=True), **SETTINGS)


def test_silent_data_cannot_be_trained_on_for_sound(heard, latents, tmp_path):
    dit = config(latents).stages.dit
    for name, value, message in (
        ("data.sources", (f"{latents}/latents",), "asks for sound, and none of"),
        ("data.sound_budget", 5, r"needs 10 of `sound_budget` \(=5\)"),
        ("cut", 1.5, "`cut` .=1.5. must be a number from 0 to 1"),
        ("pairings.sound", -1.0, "at least 0"),
    ):
        changed = dit.copy_and_resolve_references()
        changed.data.sources = (f"{heard}/latents",)
        changed.data.validation = ""
        changed.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=message):
            train(changed, str(tmp_path / "never"))


def test_a_network_goes_on_from_a_silent_one(heard, workdir, tmp_path):
    """Pictures are at first what they were."""
    stages = config(workdir)
    dit = stages.stages.dit
    dit.data.sources = (f"{heard}/latents",)
    dit.data.validation = ""
    dit.start_from = f"{workdir}/dit/model"
    dit.steps = 1
    dit.optim.lr = 1e-9
    dit.sample.update(prompts=(), scored=0)
    train(dit, str(tmp_path / "grown"))
    old, new = (Generator.load(x) for x in (workdir / "dit", tmp_path / "grown"))
    mute = request(sound=False)
    # Of latents, since these have statistics of their own.
    before, after = (x.latents([mute], steps=2)[0] for x in (old, new))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_what_is_heard_is_reported_with_its_controls(heard, tmp_path):
    args = ("--workdir", heard / "dit", "--n", "8", "--steps", "2", "--out", tmp_path)
    done = command("evaluate", *args, "--given", "picture", "--frames", "17")
    assert done.returncode == 0, done.stderr
    (column,) = json.loads((tmp_path / "report.json").read_text())["columns"]
    assert column["scores"]["color"] == column["real"]["color"], "it was given"
    assert (
        column["real"]["sync_40ms"][0] > column["controls"]["silence"]["sync_40ms"][0]
    )
    assert {"another clip's", "60 ms late"} <= set(column["controls"])
    page = (tmp_path / "report.html").read_text()
    assert "class=heard" in page


def test_a_film_sounds_as_its_latents_do_at_once(generator):
    """Each window knows the sound of the one before, at its own times."""
    model = dataclasses.replace(generator.model, conditions=("extend",))
    shooting, windows = Generator(model), []
    solve = shooting.solve

    def noted(requests, **options):
        for found in solve(requests, **options):
            windows.append((requests[0], found[0]))
            yield found

    shooting.solve = noted  # type: ignore[method-assign]
    settings = Settings(**SETTINGS, guidance_scale=1.0)
    film = Film(request(frames=13, seed=7), 30, carry=2)
    pieces = [*make_film(shooting, film, settings)]
    audio = np.concatenate([x.audio for x in pieces])
    assert audio.shape == (round(30 / 8 * RATE), 1)
    assert sum(len(x.audio) > 0 for x in pieces) > 2  # written as it is made
    heard = [windows[0][1].sound]
    for asked, found in windows[1:]:
        known = asked.tail.sound
        so_far = np.concatenate(heard)
        np.testing.assert_array_equal(known, so_far[len(so_far) - len(known) :])
        assert 0 <= asked.tail.late < 512 / RATE
        np.testing.assert_allclose(found.sound[: len(known)], known, atol=1e-5)
        heard.append(found.sound[len(known) :])
    whole = shooting.codec.decode_sound(np.concatenate(heard), len(audio))
    np.testing.assert_allclose(audio, whole, atol=1e-5)
