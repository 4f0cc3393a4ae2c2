import dataclasses
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from jvdit.data.world import NUMBERS, World, captions, vocabulary
from jvdit.data.world.impacts import FREQUENCIES, SMALL_PITCH, bounce_tone
from jvdit.data.world.mechanics import PAIR, WALL_X, WALL_Y
from jvdit.data.world.render import PALETTE, signed_distance
from jvdit.data.world.scene import (
    COLORS,
    DIRECTIONS,
    GRAVITY,
    MATERIALS,
    RAMP_SECONDS,
    SHAPES,
    SIZES,
    SPEEDS,
    SPLITS,
    TEXTURES,
    TONES,
    held_out,
    splitmix64,
)

KNOWN = ("train", "val", "test")


def truth(split="train", ids=256, **size):
    world = World(split, **size)
    scenes = world.scenes(np.arange(ids))
    return world, scenes, world.simulate(scenes)


# Determinism


def test_generator_is_splitmix64():
    # The published outputs for the seed 1234567.
    assert splitmix64(np.array([1234567], np.uint64), 5).tolist()[0] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("split", ["train", "ood_size", "ood_count"])
def test_a_clip_does_not_depend_on_its_batch(split):
    world = World(split, seed=3)
    ids = np.random.default_rng(0).permutation(300)[:40]
    together = world.clips(ids)
    in_order = world.clips(np.sort(ids))
    for place, index in enumerate(ids):
        alone = world.clips(ids[place : place + 1])
        other = np.searchsorted(np.sort(ids), index)
        for name in ("video", "audio", "caption"):
            assert np.array_equal(together[name][place], alone[name][0])
            assert np.array_equal(together[name][place], in_order[name][other])
    assert np.array_equal(together["video"], world.videos(ids))
    assert together["caption"] == world.captions(ids)
    assert together["video"].shape == (40, 17, 64, 64, 3)
    assert together["audio"].shape == (40, 34000, 1)
    assert together["audio"].dtype == np.float32
    assert np.abs(together["audio"]).max() <= 1


def test_seeds_and_splits_are_different_worlds():
    worlds = [World(split, seed) for split in SPLITS[:4] for seed in (0, 1)]
    starts = [world.scenes(np.arange(50)).position.ravel() for world in worlds]
    for one, other in itertools.combinations(starts, 2):
        assert (one != other).mean() > 0.95


def test_size_and_rate_do_not_change_the_story():
    world, scenes, motion = truth(ids=24)
    ids = scenes.ids
    times = np.arange(17) / 8
    larger = World(height=128, width=128, frames=33, fps=16)
    longer = World(frames=33)
    for other in (larger, longer):
        same = other.scenes(ids)
        for field in dataclasses.fields(scenes):
            name = field.name
            assert np.array_equal(getattr(scenes, name), getattr(same, name)), name
        moved = other.simulate(same)
        assert np.array_equal(moved.positions(times), motion.positions(times))
    clips, more = world.clips(ids), longer.clips(ids)
    assert np.array_equal(clips["video"], more["video"][:, :17])
    assert np.array_equal(clips["audio"], more["audio"][:, : world.samples])
    # Twice the pixels and frames: the same picture seen more sharply.
    fine = larger.videos(ids)[:, ::2].astype(float)
    fine = fine.reshape(24, 17, 64, 2, 64, 2, 3).mean((3, 5))
    assert np.abs(fine - clips["video"]).mean() < 1
    wide = World(height=48, width=80, audio_rate=24000)
    assert wide.captions(ids) == world.captions(ids)


def test_golden():
    """Numbers written down once; a rounding of another machine may move pixels by 1."""
    clips = World(seed=1).clips(np.arange(3))
    quadrants = clips["video"][:, 9].reshape(3, 2, 32, 2, 32, 3).mean((2, 4))
    assert np.abs(quadrants.reshape(3, 12) - GOLDEN_QUADRANTS).max() < 1
    loud = np.sqrt((clips["audio"].reshape(3, -1) ** 2).mean(1))
    np.testing.assert_allclose(loud, GOLDEN_LOUDNESS, rtol=1e-3)
    assert clips["caption"][0] == GOLDEN_CAPTION
    world, _, motion = truth(ids=3, seed=1)
    last = motion.positions(np.array([2.0]))[:, 0, 0]
    np.testing.assert_allclose(last, GOLDEN_POSITIONS, rtol=0, atol=1e-12)


# Scenes


def test_held_out_triples_occur_in_comp_alone():
    for split in SPLITS:
        scenes = World(split).scenes(np.arange(4000))
        objects = scenes.color, scenes.shape, scenes.direction
        out = held_out(*objects)
        if split == "comp":
            assert out[:, 0].all()
            assert not (out & scenes.present)[:, 1:].any()
            assert len(set(zip(*(x[:, 0] for x in objects), strict=True))) == 40
        else:
            assert not (out & scenes.present).any()
        if split == "train":
            seen = [x[scenes.present] for x in objects]
            for one, two in itertools.combinations(range(3), 2):
                pairs = set(zip(seen[one], seen[two], strict=True))
                assert len(pairs) == (64 if (one, two) == (0, 2) else 40)
            assert len(set(zip(*seen, strict=True))) == 280


def test_splits_differ_in_what_their_names_say():
    def measures(split):
        scenes = World(split).scenes(np.arange(3000))
        here = scenes.present & ~scenes.bar[:, None]
        rate = np.sqrt((scenes.velocity**2).sum(-1))
        return scenes.count, scenes.radius[here], rate[here]

    count, radius, rate = measures("train")
    for split in ("val", "test", "comp"):
        for ours, theirs in zip(measures(split), (count, radius, rate), strict=True):
            np.testing.assert_allclose(ours.mean(), theirs.mean(), rtol=0.02)
            assert theirs.min() * 0.98 < ours.min() <= ours.max() < theirs.max() * 1.02
    for split, field, known in (("ood_size", 1, radius), ("ood_speed", 2, rate)):
        value = measures(split)[field]
        assert ((value < known.min()) | (value > known.max())).all()
        assert (value < known.min()).any() and (value > known.max()).any()
    assert (measures("ood_count")[0] == 4).all() and count.max() == 3
    for split, count in (("single", 1), ("pair", 2), ("falling", 1)):
        quiet = World(split).scenes(np.arange(3000))
        assert (quiet.count == count).all()
        assert (quiet.gravity == (split == "falling")).all()
        for event in (quiet.bar, quiet.light, quiet.pan):
            assert not event.any()


def test_scene_statistics():
    scenes = World().scenes(np.arange(20000))
    counts = np.bincount(scenes.count, minlength=4) / 20000
    np.testing.assert_allclose(counts, [0, 0.45, 0.40, 0.15], atol=0.01)
    shares = [scenes.gravity, scenes.light != 0, scenes.pan != 0, scenes.bar]
    shares = [share.mean() for share in shares]
    np.testing.assert_allclose(shares, [0.25, 0.30, 0.16, 0.07], atol=0.01)
    color = scenes.color[scenes.present]
    np.testing.assert_allclose(np.bincount(color) / len(color), 1 / 8, atol=0.01)
    ordered = np.sort(np.where(scenes.present, scenes.color, [10, 11, 12, 13]), 1)
    assert (np.diff(ordered, axis=1) > 0).all(), "colors repeat within a scene"


def test_captions_state_the_facts():
    for split in SPLITS:
        world, scenes, _ = truth(split, 400)
        for row, caption in enumerate(world.captions(scenes.ids)):
            head, rest = caption.rstrip(".").split(": ")
            objects, backdrop = rest.split(" on a ")
            objects = objects.split(", ")
            backdrop, *events = backdrop.split(", ")
            count = scenes.count[row]
            assert head.split()[0] == NUMBERS[count - 1] and len(objects) == count
            for slot, words in enumerate(objects):
                _, size, color, material, shape, _, speed, direction = words.split()
                assert SIZES.index(size) == scenes.size[row, slot]
                assert COLORS.index(color) == scenes.color[row, slot]
                assert MATERIALS.index(material) == scenes.material[row, slot]
                assert SHAPES.index(shape) == scenes.shape[row, slot]
                assert SPEEDS.index(speed) == scenes.speed[row, slot]
                angle = 45 * DIRECTIONS.index(direction)
                x, y = scenes.velocity[row, slot]
                error = np.degrees(np.arctan2(y, x)) - angle
                assert abs((error + 180) % 360 - 180) < 12.01
                assert (np.hypot(x, y) > 0.6) == (speed == "quickly")
                if "ood_size" != split:
                    assert (scenes.radius[row, slot] > 0.1125) == (size == "large")
            tone, texture, _ = backdrop.split()
            assert TONES.index(tone) == scenes.tone[row]
            assert TEXTURES.index(texture) == scenes.texture[row]
            events = " ".join(events)
            assert ("gravity" in events) == scenes.gravity[row]
            assert ("behind a grey bar" in events) == scenes.bar[row]
            light = ("brightens" in events) - int("dims" in events)
            assert light == scenes.light[row]
            pan = ("pans left" in events) - int("pans right" in events)
            assert pan == scenes.pan[row]


def test_vocabulary_is_exactly_the_words_of_the_captions():
    words = set()
    for split in SPLITS:
        for caption in World(split).captions(np.arange(2000)):
            words.update(re.findall(r"[a-z-]+", caption))
    assert sorted(words) == vocabulary()
    assert len(words) < 60


# Physics


@pytest.mark.parametrize("split", SPLITS)
def test_objects_stay_inside_and_apart(split):
    for size in ({}, {"width": 112}, {"height": 160}):
        _, scenes, motion = truth(split, 400, **size)
        times = np.sort(np.append(np.arange(0, 2.125, 1 / 60), motion.time[:3].ravel()))
        position = motion.positions(times[np.isfinite(times)])
        low, high = np.moveaxis(scenes.limits[:, None], 3, 0)
        here = scenes.present[:, None, :, None]
        inside = (position >= low - 1e-9) & (position <= high + 1e-9)
        assert (inside | ~here).all()
        # Without the final clip too: the flights themselves end at the walls.
        inside = (motion.position >= low - 1e-9) & (motion.position <= high + 1e-9)
        assert (inside | ~here).all()
        for one, two in itertools.combinations(range(4), 2):
            both = scenes.present[:, one] & scenes.present[:, two]
            apart = np.sqrt(((position[:, :, one] - position[:, :, two]) ** 2).sum(-1))
            touch = (scenes.radius[:, one] + scenes.radius[:, two])[:, None]
            assert (apart[both] >= touch[both] - 1e-9).all()
            assert (apart[both, 0] > touch[both, 0] + 0.01).all(), "too close at first"


def test_bounces_conserve_energy_and_momentum():
    for split in ("train", "ood_count"):
        _, scenes, motion = truth(split, 500)
        mass = np.where(scenes.present, scenes.radius**2, 0)[:, None]
        energy = mass * (motion.velocity**2).sum(-1) / 2
        energy -= mass * motion.gravity[:, None, None] * motion.position[..., 1]
        energy = energy.sum(-1)
        np.testing.assert_allclose(energy, energy[:, :1] + 0 * energy, rtol=1e-9)
        # Momentum just before a bounce is that of the flight, carried forward.
        ends = np.where(np.isfinite(motion.time), motion.time, 0)
        wait = np.maximum(ends - motion.start[:, :-1], 0)
        before = motion.velocity[:, :-1].copy()
        before[..., 1] += (motion.gravity[:, None] * wait)[..., None]
        change = (mass[..., None] * (motion.velocity[:, 1:] - before)).sum(2)
        pairs = motion.kind == PAIR
        assert pairs.sum() > 300
        np.testing.assert_allclose(change[pairs], 0, atol=1e-12)


def test_bounces_are_where_the_velocity_breaks():
    _, scenes, motion = truth(ids=200)
    times = np.linspace(0.01, 2.1, 53)
    step = 1e-7
    slope = (motion.positions(times + step) - motion.positions(times - step)) / 2e-7
    far = (np.abs(times[:, None] - motion.time[:, None]) > 2 * step).all(-1)
    smooth = far[..., None] & scenes.present[:, None]
    velocity = motion.velocities(times)
    np.testing.assert_allclose(slope[smooth], velocity[smooth], atol=1e-6)
    jumps = 0
    for row, bounce in zip(*np.nonzero(np.isfinite(motion.time)), strict=True):
        around = motion.time[row, bounce] + np.array([-1e-9, 1e-9])
        change = np.abs(np.diff(motion.velocities(around)[row], axis=0)[0])
        first, kind = motion.first[row, bounce], motion.kind[row, bounce]
        if (
            np.abs(motion.time[row] - motion.time[row, bounce]).min(
                where=np.arange(motion.time.shape[1]) != bounce, initial=9
            )
            < 1e-6
            or kind == PAIR
        ):
            continue
        axis = {WALL_X: 0, WALL_Y: 1}[kind]
        np.testing.assert_allclose(
            change[first, axis], motion.impact[row, bounce], atol=1e-6
        )
        assert change[first, 1 - axis] < 1e-6 and motion.second[row, bounce] == -1
        jumps += 1
    assert jumps > 500


def test_gravity_pulls_down_and_restitution_takes_energy():
    world, scenes, motion = truth(ids=300)
    falls = motion.velocities(np.array([0.0, 1e-3]))
    free = scenes.gravity & (motion.time[:, 0] > 1e-3)
    pulled = np.diff(falls[..., 1], axis=1)[:, 0] / 1e-3
    np.testing.assert_allclose(pulled[free], GRAVITY)
    assert free.sum() > 40 and (pulled[~scenes.gravity & free] == 0).all()
    plain = (scenes.count == 1) & ~scenes.gravity & (scenes.present[:, 0])
    dull = world.simulate(scenes, restitution=0.6)
    wall = plain & (dull.time[:, 0] < 2) & (dull.kind[:, 0] == WALL_X)
    ratio = dull.velocity[wall, 1, 0, 0] / dull.velocity[wall, 0, 0, 0]
    np.testing.assert_allclose(ratio, -0.6)


# Sound


def test_sounds_start_at_the_bounces():
    world, scenes, motion = truth(ids=200)
    audio = np.abs(world.synthesize(scenes, motion)[..., 0])
    rate = world.audio_rate
    heard = 0
    for row in range(200):
        time, impact = motion.time[row], motion.impact[row]
        first = min(
            int(np.floor(time[0] * rate)) if len(time) else 10**9, len(audio[row])
        )
        assert audio[row, : max(first, 1)].max() < 2e-3, "sound before any bounce"
        alone = np.diff(np.minimum(time, 9), prepend=-9) > 0.35
        for bounce in np.flatnonzero(alone & (impact > 0.2) & (time < 2.1)):
            at = int(round(time[bounce] * rate))
            before = audio[row, max(at - 80, 0) : at].max(initial=0)
            after = audio[row, at : at + 80].max()
            assert after > 0.03 and after > 1.5 * before, (row, bounce)
            heard += 1
    assert heard > 200


@pytest.mark.parametrize("rate", [16000, 48000])
def test_tones_tell_material_and_size(rate):
    for material, size in itertools.product(range(4), range(2)):
        tone = bounce_tone(material, size, rate)
        spectrum = np.abs(np.fft.rfft(tone, 1 << 17))
        peak = spectrum.argmax() * rate / (1 << 17)
        pitch = FREQUENCIES[material] * (SMALL_PITCH if size == 0 else 1)
        assert abs(peak / pitch - 1) < 0.03
        assert np.abs(tone).max() == 1 and np.abs(tone[-20:]).max() < 2e-3


# Pixels


def chroma(video):
    video = video.astype(float)
    return video.max(-1) - video.min(-1)


def soft_masks(video):
    """Coverage of each pixel by each color, of frames under full light."""
    rgb = video.astype(float) - video.min(-1, keepdims=True)
    pure = PALETTE - PALETTE.min(-1, keepdims=True)
    unit = pure / np.linalg.norm(pure, axis=-1, keepdims=True)
    length = np.linalg.norm(rgb, axis=-1)
    nearest = (rgb @ unit.T).argmax(-1)
    seen = chroma(video) > 6
    share = chroma(video) / (PALETTE.max(-1) - PALETTE.min(-1))[nearest]
    return (nearest[..., None] == np.arange(8)) * (share * seen * (length > 0))[
        ..., None
    ]


@pytest.mark.parametrize("height, width", [(64, 64), (96, 64), (48, 80)])
def test_pixels_agree_with_truth(height, width):
    world, scenes, motion = truth(ids=64, height=height, width=width)
    scale = min(height, width)
    times = np.arange(17) / 8
    video = world.render(scenes, motion)
    masks = soft_masks(video) / scenes.light_gain(times)[..., None, None, None]
    area = masks.sum((2, 3))
    here = scenes.present & ~scenes.bar[:, None]
    centre = motion.positions(times) * scale
    centre[..., 0] += scenes.pan_offset(times)[..., None] * scale
    pixels_y, pixels_x = np.arange(height) + 0.5, np.arange(width) + 0.5
    errors, areas = [], []
    for row, slot in zip(*np.nonzero(here), strict=True):
        mask = masks[row, ..., scenes.color[row, slot]]
        total = mask.sum((1, 2))
        assert (total > 8).all(), "an object is missing from a frame"
        x = (mask * pixels_x).sum((1, 2)) / total
        y = (mask * pixels_y[:, None]).sum((1, 2)) / total
        errors.append(np.hypot(*(np.stack([x, y], -1) - centre[row, :, slot]).T))
        expected = np.pi * (scenes.radius[row, slot] * scale) ** 2
        areas.append(total / expected)
    # Corners may overlap when objects touch, hence quantiles.
    assert np.median(errors) < 0.1 and np.quantile(errors, 0.97) < 0.4
    assert abs(np.median(areas) - 1) < 0.03 and np.quantile(areas, 0.03) > 0.9
    colors = (area > 8).any(1).sum(-1)
    assert np.array_equal(colors, scenes.count), "colors that no caption mentions"


def test_only_objects_are_colored_and_shapes_have_equal_area():
    world, scenes, motion = truth(ids=128)
    empty = dataclasses.replace(scenes, count=0 * scenes.count)
    assert chroma(world.render(empty, motion)).max() == 0
    grid = (np.arange(400) + 0.5) / 100 - 2
    for shape in range(len(SHAPES)):
        inside = signed_distance(shape, grid, grid[:, None], np.array(1.0)) < 0
        assert abs(inside.sum() / 1e4 - np.pi) < 0.03, SHAPES[shape]
        reach = [np.abs(grid[inside.any(axis)][[0, -1]]) for axis in (0, 1)]
        low, high = (scenes.half_extents / scenes.radius[..., None, None])[
            scenes.shape == shape
        ][0]
        np.testing.assert_allclose(np.stack(reach, -1), [low, high], atol=0.011)


def test_the_bar_hides_and_shows_again():
    world, scenes, motion = truth(ids=800)
    rows = np.flatnonzero(scenes.bar)
    assert len(rows) > 30
    times = np.arange(17) / 8
    x = motion.positions(times)[rows, :, 0, 0]
    reach = scenes.half_extents[rows, 0, :, 0].max(-1)[:, None] + 1 / 64
    left, right = scenes.bar_span[rows].T[..., None]
    hidden = (x - reach > left) & (x + reach < right)
    beside = (x + reach < left) | (x - reach > right)
    seen = chroma(world.videos(rows)).max((2, 3)) > 26
    assert not seen[hidden].any() and seen[beside].all()
    assert hidden.any(1).all() and beside[:, 0].all() and beside[:, -4:].any(1).all()


def test_light_ramps_and_camera_pans():
    world, scenes, motion = truth(ids=200, height=100, width=100)
    video = world.render(scenes, motion)
    assert scenes.light_gain(np.array([RAMP_SECONDS])).max() == 1
    lit = np.flatnonzero(scenes.light)
    corner = video[lit, :, :3, :3].mean((2, 3, 4))
    ratio = corner[:, -1] / corner[:, 0]
    expected = np.where(scenes.light[lit] > 0, 1 / 0.45, 0.45)
    np.testing.assert_allclose(ratio, expected, rtol=0.05)
    empty = dataclasses.replace(scenes, count=0 * scenes.count, light=0 * scenes.light)
    ground = world.render(empty, motion)[..., 0].astype(int)
    panned = np.flatnonzero(scenes.pan)
    assert len(panned) > 20
    for row in panned:  # by 0.16 of 100 pixels
        early, late = ground[row, 0], ground[row, -1]
        if scenes.pan[row] < 0:
            early, late = late, early
        assert np.abs(late[:, 16:] - early[:, :-16]).max() <= 1
        assert np.abs(late - early).max() > 10
    still = np.flatnonzero(scenes.pan == 0)
    assert (ground[still] == ground[still, :1]).all()


# The door


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"split": "tset"}, "try 'test'"),
        ({"seed": -1}, "seed"),
        ({"frames": 0}, "frames.*try 17"),
        ({"height": 8}, "height.*from 16"),
        ({"width": 15}, "width"),
        ({"height": 16, "width": 80}, "width.*over.*height"),
        ({"fps": 0.0}, "fps.*positive"),
        ({"fps": float("nan")}, "fps"),
        ({"audio_rate": 4000}, "audio_rate.*8000"),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        World(**arguments)


def test_bad_ids_are_named():
    with pytest.raises(ValueError, match="ids.*-3"):
        World().clips(np.array([4, -3]))


def test_edges_of_the_settings_work():
    for arguments in (
        {"frames": 1},
        {"height": 16, "width": 16, "audio_rate": 8000},
        {"height": 16, "width": 64, "fps": 3},
        {"height": 67, "width": 35, "fps": 23.976},
        {"frames": 70, "height": 32, "width": 32},  # longer than the noise table
    ):
        for split in ("train", "ood_size", "ood_count"):
            world = World(split, **arguments)
            clips = world.clips(np.arange(4))
            shape = (4, world.frames, world.height, world.width, 3)
            assert clips["video"].shape == shape
            seconds = world.frames / world.fps
            assert clips["audio"].shape == (4, round(seconds * world.audio_rate), 1)
            assert np.isfinite(clips["audio"]).all()
    nothing = World().clips(np.arange(0))
    assert nothing["video"].shape[0] == 0 and nothing["caption"] == []
    assert captions(World().scenes(np.arange(0))) == []


def test_runs_without_jax_and_names_bad_types_there():
    code = """
import sys, numpy as np
from jvdit.data.world import World
World().clips(np.arange(2))
assert not {"jax", "flax", "grain"} & set(sys.modules)
for ids in (np.zeros(2), np.zeros((2, 2), int)):
    try:
        World().scenes(ids)
    except ValueError as error:
        assert "np.arange" in str(error)
    else:
        raise AssertionError(ids)
try:
    World(frames=2.5)
except ValueError as error:
    assert "frames" in str(error) and "try 17" in str(error)
else:
    raise AssertionError("frames")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


GOLDEN_QUADRANTS = [
    [
        105.5,
        119.1,
        105.5,
        107.1,
        115.3,
        107.1,
        102.5,
        126.7,
        125.5,
        121.7,
        121.7,
        102.9,
    ],
    [38.1, 60.3, 60.3, 62.1, 51.1, 40.2, 40.1, 40.1, 40.1, 40.6, 40.6, 40.6],
    [
        121.0,
        120.8,
        120.8,
        137.3,
        119.6,
        107.5,
        122.1,
        120.0,
        120.0,
        127.7,
        114.8,
        114.8,
    ],
]
GOLDEN_LOUDNESS = [0.04806, 0.05874, 0.031812]
GOLDEN_POSITIONS = [
    [0.47528332738028767, 0.8277492957361003],
    [0.36081684336784753, 0.32754130159612227],
    [0.7842971417884064, 0.47852608810595004],
]
GOLDEN_CAPTION = (
    "three objects: a small yellow wooden cross moving quickly down-left,"
    " a small cyan rubber diamond moving slowly down-left,"
    " a small green rubber square moving quickly up-left on a grey striped background."
)
