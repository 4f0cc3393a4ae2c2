"""What is given of a clip: the same tokens in training and for a request."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import thread_config
from closeness import assert_close
from jaxtyping import Float
from PIL import Image

from jvdit.data.cameras import CameraPath, plucker_rays
from jvdit.data.clips import SIZE, make_index
from jvdit.data.conditions import CONDITIONS, check_given, known
from jvdit.data.conditions.beside import VIEWS, halved
from jvdit.data.conditions.giving import (
    GivenSource,
    given_sources,
    known_in_training,
    marking,
)
from jvdit.data.conditions.known import Known, Place, Tail, merged
from jvdit.data.items import Statistics, item_of, with_sound
from jvdit.data.latent_source import LatentSource
from jvdit.data.packed_batches import PackedBatches
from jvdit.data.patches import sound_positions
from jvdit.data.plan import PackPlan
from jvdit.data.sources import open_source
from jvdit.data.world import World
from jvdit.diffusion.denoise import Guidance
from jvdit.evaluation.giving_truth import GIVEN
from jvdit.generation.generator import Generator
from jvdit.generation.inputs import given_sound
from jvdit.generation.request import Request
from jvdit.sharding import make_mesh
from jvdit.tasks.encoding import encode as encode_dataset
from jvdit.tasks.flow import FlowTask
from jvdit.weights.encoders import ClipEncoder
from jvdit.weights.fitting import other_parts
from jvdit.weights.parameters import load_weights

FRAMES, SIDE, FPS, STRIDE = 9, 16, 8.0, 2
PATCH, TEXT = (1, 2, 2), np.zeros((2, 5), np.float32)
HOW = {"patch_size": PATCH, "fps": FPS, "temporal_compression": STRIDE}
TRAINED = [name for name, row in CONDITIONS.items() if row.trains]


def encode(video: Float[np.ndarray, "T H W 3"]):
    """A causal autoencoder: means of 2 x 2 pixels and, but for the first, of frames."""
    t, h, w, _ = video.shape
    cells = video.reshape(t, h // 2, 2, w // 2, 2, 3).mean((2, 4))
    later = cells[1:].reshape(-1, STRIDE, *cells.shape[1:]).mean(1)
    return np.concatenate([cells[:1], later]).astype(np.float32)


RATE, HOP = 800, 40  # samples per second, and of a latent
LATENT_RATE = RATE / HOP
SOUND = np.random.default_rng(3).uniform(-1, 1, (900, 1)).astype(np.float32)


def encode_sound(audio: Float[np.ndarray, "a e"]):
    """Two channels: mean and power of so many samples, the last filled up."""
    parts = np.pad(audio[:, 0], (0, -len(audio) % HOP)).reshape(-1, HOP)
    return np.stack([parts.mean(1), parts.std(1)], axis=1).astype(np.float32)


PLACE = Place(5, encode, STRIDE, 2, channels=3)
HEARD = PLACE._replace(
    encode_sound=encode_sound, sound=(RATE, 1), latent_rate=LATENT_RATE
)
WORLD = World("train", 0, FRAMES, SIDE, SIDE, fps=FPS)
SHOWN = 13  # a clip of which the camera pans


@pytest.fixture(scope="module")
def video():
    return WORLD.clips(np.array([SHOWN]), audio=False)["video"][0]


@functools.cache
def beside():
    """What the world knows of that clip besides."""
    found = WORLD.clips(np.array([SHOWN]), audio=False, beside=("guide", "camera"))
    return {name: found[name][0] for name in ("guide", "camera")}


def camera_path():
    """The path of its camera, of a picture of another size."""
    poses = beside()["camera"][:, :12].reshape(-1, 3, 4)
    inside = np.tile(np.array([64.0, 64.0, 40.0, 32.0]), (len(poses), 1))
    return CameraPath(poses, inside, height=64.0, width=80.0, fps=FPS)


def to_float(video):
    return video.astype(np.float32) / 127.5 - 1


def view_of(name, video):
    """What encoding stores of a view."""
    view = VIEWS[name]
    if view.of == "camera":
        return view.measured(beside()["camera"], (5, SIDE // 2, SIDE // 2), STRIDE)
    video = video if view.of == "video" else beside()[view.of]
    parts = [encode(to_float(x)) for x in VIEWS[name].clips(video)]
    return np.concatenate(parts)


class Views(LatentSource):
    """Clips of latents, and a view of each, as `LatentSource` reads them."""

    temporal_compression = STRIDE

    def __init__(self, videos):
        self.path, self.videos, self.view = "clips", videos, ""
        self.fingerprint, self.views = "views", tuple(VIEWS)
        sizes = [encode(to_float(x)).shape[:3] for x in videos]
        columns = dict(zip(SIZE, np.transpose(sizes), strict=True))
        self.index = make_index(len(videos), fps=FPS, text_length=3, **columns)

    def _read_one(self, i):
        mean = encode(to_float(self.videos[i]))
        clip = {"mean": mean, "fps": FPS, "caption": "", "text_embeds": TEXT}
        clip["logvar"] = np.full_like(mean, -4.0)
        return clip | (
            {"view": view_of(self.view, self.videos[i])} if self.view else {}
        )


def learned(video, name, seed=0):
    """A clip in training, always given one condition."""
    row = CONDITIONS[name]
    mean = encode(to_float(video))[row.headless :]
    view, count = view_of(row.view, video) if row.view else None, 0
    if row.beside is not None:
        cells = np.prod(view.shape[1:3])
        count = int(row.beside.count(len(view), np.array([seed]))[0] * cells) // 4
    sound = encode_sound(SOUND) if "keep_sound" in row.takes else np.zeros((0, 2))
    what = known_in_training(
        mean,
        view,
        name if row.changes_clips else "",
        {} if row.changes_clips else {name: 1.0},
        patch_size=PATCH,
        fps=FPS,
        temporal_compression=STRIDE,
        beside=count,
        sounds=np.arange(1, len(sound) + 1) / LATENT_RATE,
        rng=np.random.default_rng(seed),
    )
    logvar = np.full_like(mean, -4.0)
    how = HOW | {"first": int(row.headless), "logvar": logvar}
    item = item_of(mean, known=what, text_embeds=TEXT, **how)
    if not len(sound):
        return what, item
    place = sound_positions(len(sound), LATENT_RATE, None, STRIDE)
    how = {"given": what.sound_clean, "logvar": np.full_like(sound, -4.0)}
    return what, with_sound(item, sound, place, **how)


def spans_of(clean):
    """The spans of a sound of which these latents are given."""
    edges = np.flatnonzero(np.diff(np.r_[0, clean.astype(int), 0])).reshape(-1, 2)
    last = len(SOUND) / RATE
    ends = ((a / LATENT_RATE, min(b / LATENT_RATE, last)) for a, b in edges)
    return tuple(ends)


def asked(video, name, what):
    """The request that gives the same."""
    picture = {"prompt": "", "frames": FRAMES, "height": SIDE, "width": SIDE}
    times = [t for part in what.parts for t in part.times]
    at = [round(t * FPS) % FRAMES for t in times]
    kept = 0 if what.clean is None else int(what.clean.all(axis=(1, 2)).sum())
    given = {
        "first_frame": {"image": video[0]},
        "prefix": {"prefix": video[: 1 + (kept - 1) * STRIDE]},
        "suffix": {"suffix": video[FRAMES - len(times) :]},
        "extend": {"tail": Tail(encode(to_float(video))[1 : 1 + kept])},
        "keyframes": {"keyframes": tuple((i / FPS, video[i]) for i in at)},
        "interpolate": {"interpolate": video[::2]},
        "upscale": {"upscale": halved(video)},
        "edges": {"edges": video},
        "guide": {"guide": beside()["guide"]},
        "camera": {"camera": camera_path()},
    }
    if name == "inpaint_sound":
        given[name] = {"from_sound": SOUND, "keep_sound": spans_of(what.sound_clean)}
    if name == "inpaint":
        change = np.repeat(~what.clean, [1] + [STRIDE] * 4, axis=0)
        mask = change.repeat(2, 1).repeat(2, 2)[..., None].repeat(3, -1)
        given["inpaint"] = {"video": video, "mask": mask.astype(np.uint8) * 255}
    if name == "reference":
        stills = view_of("stills", video)
        which = [
            int(np.abs(stills - x).sum(axis=(1, 2, 3)).argmin())
            for x in what.parts[0].latents
        ]
        given["reference"] = {"references": tuple(video[i] for i in which)}
    return Request(**picture, fps=FPS, **given[name])


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_request_gives_what_training_gave(video, name, seed):
    """The same clean tokens, at the same positions, beside the same noisy ones."""
    what, ours = learned(video, name, seed)
    request = asked(video, name, what)
    check_given([name], request.given)
    found = known([name], request, HEARD)
    blank = np.zeros((5 - found.headless, 8, 8, 3), np.float32)
    how = HOW | {"first": int(found.headless)}
    theirs = item_of(blank, known=found, text_embeds=TEXT, **how)
    if ours.sounds:
        latents, given = given_sound(found, ours.sounds, 2)
        place = sound_positions(ours.sounds, LATENT_RATE, None, STRIDE)
        theirs = with_sound(theirs, latents, place, given=given)
    np.testing.assert_array_equal(theirs.position, ours.position)
    np.testing.assert_array_equal(theirs.level, ours.level)
    assert theirs.beside == ours.beside
    clean = np.broadcast_to(ours.level, len(ours.latents)) == 0
    if CONDITIONS[name].channels:
        np.testing.assert_allclose(theirs.cond, ours.cond, atol=1e-5)
        assert np.abs(ours.cond).max() > 0.5 and not clean.any()
        return
    assert 0 < clean.sum() < len(clean)
    np.testing.assert_allclose(theirs.latents[clean], ours.latents[clean], atol=1e-2)
    assert (ours.logvar[clean] < -20).all() and (ours.logvar[~clean, :2] == -4).all()
    picture = ~clean[: ours.spans[0][1]]  # a sound's latents are narrower
    assert (ours.logvar[: len(picture)][picture] == -4).all()


def test_what_is_given_beside_a_clip_lies_where_it_belongs(video):
    """Half the size at the middle of what it covers; references nowhere in time."""
    _, item = learned(video, "upscale")
    small = item.position[-item.beside :].reshape(5, 2, 2, 3)
    whole = item.position[: -item.beside].reshape(5, 4, 4, 3)
    pooled = whole.reshape(5, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(small, pooled)
    _, item = learned(video, "reference")
    assert (item.position[-item.beside :, 0] < 0).all()
    _, item = learned(video, "interpolate")
    slow = item.position[-item.beside :, 0].reshape(3, -1)[:, 0]
    np.testing.assert_allclose(slow, [0, 1.5 * 2 / FPS, 3.5 * 2 / FPS])


def test_conditions_of_any_kind_together(video):
    """First and last frame, and a mask: what each gives, none twice."""
    request = asked(video, "first_frame", learned(video, "first_frame")[0])
    mask = np.full((FRAMES, SIDE, SIDE, 3), 255, np.uint8)
    mask[:, :, : SIDE // 2] = 0
    both = {"last_image": video[-1], "video": video, "mask": mask}
    request = dataclasses.replace(request, **both)
    found = known(["first_frame", "suffix", "inpaint"], request, PLACE)
    assert found.clean[0].all() and found.clean[:, :, :4].all()
    assert not found.clean[1:, :, 4:].any() and len(found.parts) == 1
    assert_close(found.latents[found.clean], encode(to_float(video))[found.clean])


def test_signals_lie_side_by_side(video):
    """Whatever else is given, and however the model lists what it takes."""
    request = asked(video, "guide", learned(video, "guide")[0])
    taken = ["camera", "first_frame", "guide", "edges"]
    alone = known(["guide"], request, PLACE).cond
    both = dataclasses.replace(request, camera=camera_path(), image=video[0])
    found = known(taken, both, PLACE)
    assert found.cond.shape[-1] == 3 + 3 + 12 and found.clean[0].all()
    assert not found.cond[..., :3].any()
    np.testing.assert_array_equal(found.cond[..., 3:6], alone)
    np.testing.assert_array_equal(found.cond[..., 6:], view_of("camera", video))
    trained = known_in_training(
        encode(to_float(video)),
        view_of("camera", video),
        "camera",
        {},
        beside=0,
        sounds=np.zeros(0),
        rng=np.random.default_rng(0),
        conditions=taken[::-1],
        **HOW,
    )
    np.testing.assert_array_equal(trained.cond[..., 6:], found.cond[..., 6:])
    assert not trained.cond[..., :6].any()
    tail = Tail(encode(to_float(video))[1:3])  # a clip without its first latent frame
    later = known(
        [*taken, "extend"], dataclasses.replace(both, tail=tail, image=None), PLACE
    )
    np.testing.assert_array_equal(later.cond, found.cond[1:])


def test_parts_of_a_sound_are_kept_exactly_and_the_rest_is_made(video):
    """By spans in seconds; nothing jumps where they end."""
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": FPS}
    keep = ((0.0, 0.3), (0.62, math.inf))
    request = Request("", **size, from_sound=SOUND, keep_sound=keep)
    found = known(["inpaint_sound", "sound_to_picture"], request, HEARD)
    last = np.arange(23) >= 13  # from 0.65 s on
    assert (found.sound_clean == (np.arange(23) < 6) | last).all()
    made = np.zeros_like(SOUND)
    mixed = request.sound_kept(made, RATE)
    np.testing.assert_array_equal(mixed[:240], SOUND[:240])
    np.testing.assert_array_equal(mixed[496:], SOUND[496:])
    assert not mixed[245:492].any() and np.abs(mixed[240:245]).max() > 0
    whole = dataclasses.replace(request, keep_sound=())
    assert (
        known(["inpaint_sound", "sound_to_picture"], whole, HEARD).sound_clean is None
    )
    assert request.settings["keep_sound"] == [[0.0, 0.3], [0.62, None]]
    given = dataclasses.replace(request, from_video=video)
    both = known(["picture_to_sound", "inpaint_sound"], given, HEARD)
    assert both.clean.all() and both.sound_clean.sum() == found.sound_clean.sum()


@pytest.mark.parametrize(
    "spans, message",
    [
        (((0.0, 0.5), (0.4, 0.8)), "has 0.4:0.8 after 0.5 s.*without overlap"),
        (((0.5, 0.5),), "has 0.5:0.5"),
        (((-0.5, 0.5),), "has -0.5:0.5"),
        (((0.5, 2.0),), "0.5:2 goes beyond the end.*lasts 1.125 s"),
        (((2.0, math.inf),), "2:inf goes beyond the end"),
        (((0.51, 0.52),), "0.51:0.52 holds no whole latent.*every 0.05 s"),
    ],
)
def test_spans_that_cannot_be_kept(spans, message):
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": FPS}
    with pytest.raises(ValueError, match=message):
        request = Request("", **size, from_sound=SOUND, keep_sound=spans)
        known(["inpaint_sound"], request, HEARD)


def test_what_two_know_of_a_sound_is_put_together():
    """A beginning, and spans: the later one counts where both do."""
    first = Known(sound=np.ones((3, 2), np.float32))
    marks = np.array([False, False, True, False, True])
    second = Known(sound=np.full((5, 2), 2.0, np.float32), sound_clean=marks)
    found = merged([first, second])
    assert found.sound_clean.tolist() == [True, True, True, False, True]
    assert found.sound[:, 0].tolist()[:3] == [1, 1, 2] and found.sound[4, 0] == 2


def builder(shares, **options):
    world = World("single", 0, FRAMES, SIDE, SIDE, fps=FPS)
    videos = [*world.clips(np.arange(30), audio=False)["video"]]
    videos += [video[:1] for video in videos[:10]]
    sources, weights = given_sources([Views(videos)], None, shares, PATCH)
    budgets = {"token_budget": 160, "text_budget": 96, "max_clips": 6}
    plan = PackPlan.of(sources, weights=weights, rows_per_step=4, **budgets)
    return PackedBatches(
        sources,
        plan,
        latents=Statistics(np.zeros(3), np.ones(3)),
        temporal_compression=STRIDE,
        null_embeds=TEXT,
        given=marking(shares),
        **options,
    )


def test_a_plan_packs_what_is_given():
    """Each condition in its share of clips; a step is a function of its number."""
    shares = {"keyframes": 0.25, "upscale": 0.25, "prefix": 0.5}
    made = builder(shares)
    given = {"beside": 0, "clean": 0}
    clips = 0
    for step in range(30):
        batch, bad = made[step]
        assert not bad
        again, _ = builder(shares)[step] if step == 3 else (batch, None)
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
        for row, slots in enumerate(made.plan.rows(step)):
            for number, slot in enumerate(slots, 1):
                mine = batch["segment"][row] == number
                source, clip = made.locate(made.clip_id(slot))
                frames = made.sources[0].index["frames"][clip]
                assert source == 0 and mine.sum() == slot.tokens
                if frames == 1:
                    continue
                clips += 1
                given["beside"] += slot.tokens > 5 * 16
                first = batch["level"][row, mine][:16]
                given["clean"] += not first.any()
    assert 0.35 < given["beside"] / clips < 0.65
    assert 0.35 < given["clean"] / clips < 0.65


def test_given_sources_keep_to_what_can_be_given(video):
    pictures, odd = Views([video[:1]] * 3), Views([video[:3]])
    assert len(GivenSource(pictures, 0, "upscale", PATCH)) == 3
    with pytest.raises(ValueError, match="keyframes.*can't be given of any clip"):
        GivenSource(pictures, 0, "keyframes", PATCH)
    with pytest.raises(ValueError, match="interpolate.*can't be given"):
        GivenSource(odd, 0, "interpolate", PATCH)
    odd.views = ("small",)
    with pytest.raises(ValueError, match="view 'stills'; encode clips anew"):
        GivenSource(odd, 0, "suffix", PATCH)
    with pytest.raises(ValueError, match=r"upscale 0.6 \+ suffix 0.5.*less than 1"):
        given_sources([odd], None, {"upscale": 0.6, "suffix": 0.5}, PATCH)
    found, weights = given_sources([odd, pictures], None, {"upscale": 0.5}, PATCH)
    assert len(found) == 4 and weights == [0.5, 1.5, 0.5, 1.5]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"keyframes": ((2.0, "p"),)}, "keyframe at 2 s lies outside.*0 to 1 s"),
        ({"keyframes": ((-0.5, "p"),)}, "keyframe at -0.5 s"),
        ({"prefix": 9}, "`prefix` has 9 frames and the clip 9"),
        ({"suffix": 12}, "`suffix` has 12 frames"),
        ({"interpolate": 4}, "`interpolate` has 4 frames and the clip needs 5"),
        ({"upscale": 5}, "`upscale` has 5 frames and the clip needs 9"),
        ({"interpolate": 5, "frames": 8}, r"needs a clip of 2 n \+ 1 frames"),
        ({"upscale": 9, "height": 15}, "sides that 2 divides"),
    ],
)
def test_what_does_not_go_with_the_clip(given, message):
    pixels = {"p": np.zeros((SIDE, SIDE, 3), np.uint8)}
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": FPS}
    for name, value in given.items():
        if name == "keyframes":
            size[name] = tuple((t, pixels[x]) for t, x in value)
        elif name in ("frames", "height"):
            size[name] = value
        else:
            size[name] = np.zeros((value, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        Request("", **size).read_given()


def test_a_mask_may_be_a_picture(video, tmp_path):
    """It holds for all frames, whatever its size."""
    mask = np.zeros((2 * SIDE, 2 * SIDE, 3), np.uint8)
    mask[:, SIDE:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": FPS}
    for given in (mask, tmp_path / "mask.png"):
        found = Request("", video=video, mask=given, **size).clip("mask")
        assert found.shape == video.shape
        assert (found[..., : SIDE // 2, :] < 127).all()
        assert (found[..., SIDE // 2 :, :] > 127).all()


def test_fields_that_go_together(video):
    for given, message in (
        ({"video": video}, "give both"),
        ({"suffix": video[:2], "last_image": video[0]}, "both say how it ends"),
        ({"upscale": video}, "`upscale` was given, but this model takes"),
        ({"keep_sound": ((0.0, 1.0),)}, "`keep_sound` says what to keep of `from_sou"),
        ({"from_sound": SOUND}, "takes no whole `from_sound`; say what to keep"),
    ):
        with pytest.raises(ValueError, match=message):
            taken = ["inpaint", "suffix", "inpaint_sound"]
            check_given(taken, Request("", **given).given)


@pytest.mark.parametrize("name", GIVEN)
def test_what_evaluation_gives_is_what_models_take(video, name):
    """And the pixels that it names are those that are given."""
    row, size = GIVEN[name], {"frames": FRAMES, "height": SIDE, "width": SIDE}
    world = World("test", **size, fps=FPS, audio_rate=8_000)
    (true,) = row.truths(world, np.arange(1))
    request = Request("", fps=FPS, **size, **row.fields(true._replace(video=video)))
    taken = {field for x in CONDITIONS.values() for field in x.takes}
    assert set(request.given) <= taken
    heard = row.reads == "audio"
    assert (request.waveform(8_000, 1) is not None) == heard == ("sound" in name)
    assert heard or name == "nothing" or request.given
    if not heard:
        request.read_given()
    if name == "camera":
        found = request.poses()
        assert found == pytest.approx(world.cameras(world.scenes(np.arange(1)))[0])
    if name == "guide":
        np.testing.assert_array_equal(request.clip("guide"), true.guide)
    if name == "inpaint_sound":
        assert request.sound_spans() == ((0.0, FRAMES / FPS / 2),)
    where = row.where(video)
    assert where.shape == video.shape[:3]
    blank = request.kept(np.zeros_like(video), masked=True)
    if name in ("prefix", "inpaint", "outpaint", "picture"):
        np.testing.assert_array_equal(blank, np.where(where[..., None], video, 0))
    frames = where.all(axis=(1, 2)).sum()
    wanted = {"both_ends": 2, "suffix": 3, "keyframes": 2, "interpolate": 5, "first": 1}
    assert frames == wanted.get(name, frames)


# Sampling


@pytest.fixture(scope="module")
def able(generator):
    """A tiny network that takes everything that lies in a row; it knows none of it."""
    rng, model = np.random.default_rng(0), generator.model
    params = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape), model.networks["dit"].params
    )
    taken = tuple(name for name in TRAINED if not CONDITIONS[name].channels)
    model = dataclasses.replace(model, conditions=taken)
    return Generator(model.with_params({"dit": params}))


def test_what_is_given_comes_back_and_neighbours_do_not_see_it(able):
    """Of requests of every kind in one batch."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
    mask = np.full_like(video, 255)
    mask[:5] = 0
    plain = Request("x", frames=9, height=16, width=16)
    given = [
        {"prefix": video[:5]},
        {"video": video, "mask": mask},
        {"keyframes": ((0.5, video[4]), (1.0, video[8]))},
        {"image": video[0], "last_image": video[8]},
        {"references": (video[0],)},
    ]
    settings = {"steps": 2, "guidance": Guidance(2.0)}
    requests = [plain, *(dataclasses.replace(plain, **x) for x in given)]
    found = able.latents(requests, **settings)
    (alone,) = able.latents([plain], **settings)
    assert_close(found[0], alone)
    whole = able.codec.encode(to_float(video))
    assert_close(found[1][:2], whole[:2])
    assert_close(found[2][:2], whole[:2])
    for latents in found[1:]:
        assert latents.shape == alone.shape
        assert np.abs(latents[2:] - alone[2:]).max() > 1e-3
    clips = able(requests[1:3], steps=2, guidance_scale=1.0)
    for clip in clips:
        np.testing.assert_array_equal(clip.video[:5], video[:5])
        assert (clip.video[5:] != video[5:]).any()


def test_a_clip_for_footage_is_as_large_and_long_as_that(able):
    video = np.zeros((5, 16, 24, 3), np.uint8)
    assert able.complete(Request("", upscale=video)).size[0] == 5
    slow = able.complete(Request("", interpolate=video))
    assert slow.size[0] == 9
    large = Request("", upscale=video, frames=5)
    height, width = able.complete(large).size[1:]
    assert (height, width) == (32, 48)


# The whole way


def test_views_are_encoded_and_trained_with(workdir, tmp_path):
    """What encoding stores beside a clip is what its encoder makes of the view."""
    encode_dataset(
        "world:train:5x16x16@8:16",
        str(workdir / "vae"),
        str(tmp_path / "latents"),
        views=("stills", "small", "edges", "guide", "camera"),
    )
    source = open_source(f"{tmp_path}/latents")
    encoder = ClipEncoder.load(workdir / "vae")
    world = World("train", 0, 5, 16, 16, fps=8.0)
    clip = world.clips(np.arange(4), audio=False, beside=("guide", "camera"))
    for name, parts in (
        ("guide", clip["guide"][3:]),
        ("stills", clip["video"][3][:, None]),
        ("small", np.stack([halved(x) for x in clip["video"]])[3:]),
    ):
        source.view = name
        padded = np.concatenate([parts] * 8)[:8]  # a device each
        found = np.asarray(encoder(padded)[0])[: len(parts)]
        stored = source.read([3])[0]["view"]
        np.testing.assert_allclose(
            stored, found.reshape(stored.shape), rtol=0.01, atol=0.01
        )
    source.view, vae = "camera", encoder.module
    rays = source.read([3])[0]["view"]
    size = vae.latent_shape(5, 16, 16)
    wanted = plucker_rays(clip["camera"][3], size, vae.temporal_compression)
    np.testing.assert_array_equal(rays, wanted)
    assert source.has("guide").all() and source.has("camera").all()
    config = thread_config.flow_config(workdir)
    config.data.sources, config.data.validation = (f"{tmp_path}/latents",), ""
    config.given.keyframes, config.data.token_budget = 0.9, 16
    task = FlowTask(config, make_mesh(), tmp_path / "run")
    assert task.objective.conditions == ("first_frame", "keyframes")
    batch, bad = task.batch_builder[0]
    assert (
        "cond" not in batch
        and not bad
        and task.names(batch)[0].startswith(f"{tmp_path}/latents:")
    )
    assert ((batch["level"] == 0) & (batch["segment"] > 0)).any()
    config.given.edges = 0.05
    task = FlowTask(config, make_mesh(), tmp_path / "run")
    assert task.objective.dit.cond_channels == 8
    drawn = [task.batch_builder[i][0]["cond"] for i in range(8)]
    followed = np.concatenate([x.any(axis=(1, 2)) for x in drawn])
    assert drawn[0].shape[-1] == 8 and 0 < followed.mean() < 0.5
    params = load_weights(workdir / "dit/model/dit")[0]
    key, example = jax.random.key(0), task.example
    wanted = jax.eval_shape(task.objective.init, key, example)["dit"]
    assert other_parts(params, wanted)
    config.given.guide = config.given.camera = 0.3
    config.given.keyframes = 0.0
    task = FlowTask(config, make_mesh(), tmp_path / "run")
    rays = 2 * 6 * vae.temporal_compression
    assert task.objective.dit.cond_channels == 8 + 8 + rays
    cond = np.concatenate([task.batch_builder[i][0]["cond"] for i in range(8)])
    # Of each latent in turn: edges, the guide, and rays; one of them at a time.
    latent = cond.reshape(-1, 2, (16 + rays) // 2)[:, 0]
    given = [x.any(axis=1) for x in np.split(latent, [4, 8], axis=1)]
    assert all(x.any() for x in given) and np.sum(given, axis=0).max() == 1
    told = json.loads((workdir / "dit/model/generator.json").read_text())
    told["conditions"].append("edges")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/generator.json").write_text(json.dumps(told))
    config.start_from = str(tmp_path / "model")
    with pytest.raises(ValueError, match="takes edges by channels .* edges, guide, "):
        FlowTask(config, make_mesh(), tmp_path / "run")
    config.start_from = ""
    config.given.guide = config.given.camera = 0.0
    config.given.edges, config.given.upscale = 0.0, 0.05
    with pytest.raises(ValueError, match="upscale.*can't be given of any clip"):
        FlowTask(config, make_mesh(), tmp_path / "run")
    with pytest.raises(ValueError, match="view 'larger' must be one of: stills"):
        encode_dataset("world:train:5x16x16@8:16", "x", "y", views=("larger",))
