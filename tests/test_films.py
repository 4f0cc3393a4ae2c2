"""Films: windows that go on from latents, decoded as if they were one clip."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from closeness import assert_close
from media_files import numbered, numbers

from jvdit.data.cameras import CameraPath, plucker_rays
from jvdit.data.media.writer import encode_clip
from jvdit.generation.film_file import Drift
from jvdit.generation.films import Film, Scene, check_film, make_film
from jvdit.generation.following import Followed, complete_window
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.results import Latents
from jvdit.generation.settings import Settings

WINDOW = Request("one object", frames=13, height=16, width=16, fps=8.0, seed=5)
SETTINGS = Settings(steps=2, solver="euler", guidance_scale=1.0)


class Noted(Generator):
    """Notes what its windows were asked for, and gave."""

    def __init__(self, model):
        super().__init__(model)
        self.windows = []

    def solve(self, requests, **options):
        """Solves windows."""
        for found in super().solve(requests, **options):
            self.windows.append((requests[0], found[0]))
            yield found


@pytest.fixture
def shooting(generator):
    rng, model = np.random.default_rng(0), generator.model
    params = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape), model.networks["dit"].params
    )
    model = dataclasses.replace(model, conditions=("first_frame", "extend"))
    return Noted(model.with_params({"dit": params}))


def made(generator, film):
    pieces = [*make_film(generator, film, SETTINGS)]
    assert [x.done for x in pieces] == [*np.cumsum([len(x.video) for x in pieces])]
    assert {x.total for x in pieces} == {film.frames}
    return np.concatenate([x.video for x in pieces])


def joined(windows, carry) -> np.ndarray:
    first, *rest = (found.picture for _, found in windows)
    return np.concatenate([first, *(x[carry:] for x in rest)])


def test_a_film_is_its_latents_decoded_at_once(shooting):
    """Each window keeps, clean, the last latents of the one before."""
    carry = 2
    video = made(shooting, Film(WINDOW, 30, carry=carry))
    assert video.shape == (30, 16, 16, 3)
    windows = shooting.windows
    assert len(windows) == 6  # 4 latents, and then 1 of the 8 in all each time
    for number, (request, found) in enumerate(windows[1:], 1):
        before = joined(windows[:number], carry)[-carry:]
        np.testing.assert_array_equal(request.tail.picture, before)
        assert_close(found.picture[:carry], before)
        assert len(found.picture) == 3
    whole = shooting.codec.decode(joined(windows, carry)[None])[0]
    np.testing.assert_allclose(video, whole[:30], atol=1)
    assert len({request.seed for request, _ in windows}) == len(windows)


def test_a_film_goes_on_from_footage(shooting):
    """Its frames stay as they are; the rest is decoded as if they were of one clip."""
    footage = np.random.default_rng(0).integers(0, 256, (18, 16, 16, 3), np.uint8)
    video = made(shooting, Film(WINDOW, 27, footage, carry=1))
    np.testing.assert_array_equal(video[:17], footage[:17])  # whole latents
    given = shooting.codec.encode(footage[:17].astype(np.float32) / 127.5 - 1)
    later = [found.picture[1:] for _, found in shooting.windows]
    whole = shooting.codec.decode(np.concatenate([given, *later])[None])[0]
    np.testing.assert_allclose(video[17:], whole[17:27], atol=1)
    np.testing.assert_array_equal(shooting.windows[0][0].tail.picture, given[-1:])


def test_scenes_begin_when_they_are_to(shooting):
    scenes = [Scene(0.0, "dawn"), Scene(2.0, "noon")]
    made(shooting, Film(WINDOW, 33, scenes=scenes, carry=1))
    prompts = [request.prompt for request, _ in shooting.windows]
    assert prompts == ["dawn", "dawn", "noon", "noon"]  # from frames 0, 13, 21, 29
    later = Film(WINDOW, 33, scenes=[Scene(2.0, "noon")], carry=1)
    assert later.prompt(1.9) == "one object" and later.prompt(2.0) == "noon"


def walk(count, fps=8.0):
    """A camera that goes one step ahead with each frame."""
    world = np.tile(np.eye(3, 4), (count, 1, 1))
    world[:, 2, 3] = -np.arange(count)
    inside = np.tile([8.0, 8.0, 8.0, 8.0], (count, 1))
    return CameraPath(world, inside, 16, 16, fps)


class Followers(Noted):
    """Makes noise of its windows, and notes what its network would be given."""

    def solve(self, requests, **options):
        """Solves windows."""
        (request,) = requests
        size = self.check(request)
        known = self.inputs.known(request, size)
        rng = np.random.default_rng(len(self.windows))
        shape = (size[0] - known.headless, *size[1:], self.model.vae.latent_channels)
        made = Latents(rng.normal(size=shape).astype(np.float32))
        self.windows.append((request, made, known))
        yield {0: made}


@pytest.fixture
def following(generator):
    taken = "first_frame", "extend", "edges", "guide", "camera"
    return Followers(dataclasses.replace(generator.model, conditions=taken))


@pytest.mark.parametrize("begun", [0, 9])
def test_each_window_follows_its_part_of_the_guide_and_the_camera(
    following, tmp_path, begun
):
    """At the times of its frames, carried ones included; of the whole film at last."""
    total, carry, each = 30, 2, 4
    guide = numbered(total)[:, :16, :16]
    encode_clip(tmp_path / "guide.mp4", guide, 8)
    footage = guide[:begun, :, ::-1] if begun else None
    request = dataclasses.replace(
        WINDOW, guide=str(tmp_path / "guide.mp4"), edges=guide, camera=walk(total)
    )
    film = Film(request, total, footage, carry=carry)
    Followed(request, total).read_given()
    pieces, windows = [*make_film(following, film, SETTINGS)], following.windows
    whole = walk(total).poses(total, 16, 16, 8.0)
    begins = [0, *(piece.done for piece in pieces)]
    for (window, _, known), done in zip(windows, begins[bool(begun) :], strict=False):
        # Before what a window makes come the frames it carries, and one that it lacks.
        first = done - (1 + carry * each) * bool(done)
        wanted = np.minimum(np.arange(first, first + 13), total - 1)
        assert numbers(window.clip("guide")) == [*wanted]
        np.testing.assert_array_equal(window.clip("edges"), guide[wanted])
        np.testing.assert_allclose(window.poses(), whole[wanted], atol=1e-6)
        rays = plucker_rays(whole[wanted], (4, *known.cond.shape[1:3]), each)
        rays = rays[int(known.headless) :]
        np.testing.assert_allclose(known.cond[..., -6 * each :], rays, atol=1e-5)
        assert known.headless == bool(done)
    assert len(windows) == len(pieces) - bool(begun) > 4
    assert wanted[-2] == total - 1 and len({*wanted}) > 1  # beyond the end


def test_a_window_is_as_long_as_without_anything_to_follow(following):
    """Not as long as the guide, which lasts as long as the film."""
    guide = np.zeros((200, 16, 32, 3), np.uint8)
    found = complete_window(following, Request("one object", guide=guide))
    usual = following.complete(Request("one object"))
    assert found.size[0] == usual.size[0] < 200


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"guide": numbered(29)}, "`guide` has 29 frames at 8.*the film 30: .* whole"),
        ({"edges": numbered(13)}, "`edges` has 13 frames"),
        ({"camera": walk(14, 4.0)}, "`camera` has 28 frames at 8 per second"),
    ],
)
def test_what_a_film_follows_must_last_as_long(following, fields, message):
    request = dataclasses.replace(WINDOW, **fields)
    with pytest.raises(ValueError, match=message) as error:
        make_film(following, Film(request, 30))
    assert "\n" not in str(error.value) and not following.windows
    check_film(following, Film(request, 12))


def test_a_film_takes_nothing_that_each_window_would_have_anew(generator):
    taken = "extend", "prefix", "suffix"
    model = dataclasses.replace(generator.model, conditions=taken)
    black = np.zeros((5, 16, 16, 3), np.uint8)
    for fields in ({"prefix": black}, {"suffix": black}, {"restyle": black}):
        request = dataclasses.replace(WINDOW, **fields)
        with pytest.raises(ValueError, match=f"isn't given `{[*fields][0]}`.*anew"):
            check_film(Generator(model), Film(request, 32))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scenes": [Scene(2.0, "a"), Scene(1.0, "b")]}, "2, 1 s; each must begin"),
        ({"scenes": [Scene(9.0, "a")]}, "begins at 9 s, and the film ends at 4 s"),
        ({"carry": 3}, r"carry.*=3.*3 latent frames.*1 to 2"),
        ({"footage": np.zeros((2, 16, 16, 3), np.uint8)}, "has 2 frames: give.* 5"),
        ({"footage": np.zeros((32, 16, 16, 3), np.uint8)}, "has 32 frames.*fewer"),
    ],
)
def test_films_that_cannot_be(shooting, fields, message):
    with pytest.raises(ValueError, match=message):
        check_film(shooting, Film(WINDOW, 32, **fields))


def test_a_model_that_cannot_go_on(generator):
    with pytest.raises(ValueError, match=r"can't go on.*given\.extend"):
        check_film(generator, Film(WINDOW, 32))


def test_drift_is_told_of_each_stretch_against_the_first():
    drift = Drift(seconds=4.0, fps=8.0)
    video = np.full((32, 4, 4, 3), 100, np.uint8)
    video[16:, ..., 0] = 151  # from the third second, 20 % of the range
    audio = np.full((400, 1), 0.1, np.float32)
    audio[300:] = 0.2
    told = []
    for i in range(0, 32, 4):
        part = audio[i * 400 // 32 : (i + 4) * 400 // 32]
        told += drift.add(video[i : i + 4], part, last=i == 28)
    assert len(told) == 3
    reds = [float(re.search(r"red ([-+.\d]+)", line)[1]) for line in told]
    np.testing.assert_allclose(reds, [0, 20, 20], atol=0.05)
    louder = [float(re.search(r"sound ([-+.\d]+)", line)[1]) for line in told]
    np.testing.assert_allclose(louder, [0, 0, 6.0], atol=0.05)
    assert told[0].startswith("1 to 2 s against the first 1")
