"""Continuous packing: clips share rows, and know nothing of one another."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from packed_bits import PROMPT, order, rows, run

from jvdit.data.sheets import png
from jvdit.generation.draft import passes
from jvdit.generation.request import Request
from jvdit.generation.restyle import noised
from jvdit.generation.results import GeneratedClip
from jvdit.generation.watermark import Watermark
from jvdit.serving.jobs import Jobs
from jvdit.serving.packed import PackedClip
from jvdit.serving.served import Served
from jvdit.serving.slots import RowShape, RowSlot, find_slot, room_of_text, soonest
from jvdit.serving.video_request import VideoRequest
from jvdit.serving.worker import Worker


@pytest.fixture(scope="module")
def packed():
    made = rows()
    assert made.takes(made.settings)
    made.warm_up()
    return made


def test_bits_do_not_depend_on_neighbours_and_nothing_is_compiled():
    """Of clips of other sizes, steps, scales and conditions, which come and go."""
    users = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = pathlib.Path(__file__).with_name("packed_bits.py")
    done = subprocess.run(
        [sys.executable, script], env=users, capture_output=True, text=True
    )
    assert "the same bits 0 compiled" in done.stdout, done.stdout + done.stderr


PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
FILM = np.stack([np.roll(PICTURE, 2 * i, 1) for i in range(9)])
GIVEN = [
    {},
    {"frames": 5, "height": 16},
    {"last_image": PICTURE, "frames": 5},
    {"keyframes": ((0.5, PICTURE), (1.0, PICTURE)), "references": (PICTURE, PICTURE)},
    {"suffix": FILM[:3], "image": PICTURE},
    {"interpolate": FILM},
    {"upscale": FILM[:, :16, :16]},
]


def assert_as_alone(packed, orders, **options):
    """Clips of rows are what the library makes of the same requests."""
    made = run(packed, orders, [0] * len(orders))
    options = orders[0][1].solving | options
    lone = packed.generator.latents([request for request, _ in orders], **options)
    for i, latents in enumerate(lone):
        np.testing.assert_allclose(made[i], latents, atol=1e-3)
    return made


def test_a_packed_clip_is_what_the_generator_makes(packed):
    """With what lies beside it, which takes room of the row."""
    orders = [order(packed, i, 4, **given) for i, given in enumerate(GIVEN)]
    assert_as_alone(packed, orders)
    generator = packed.generator
    for request, _ in orders:
        size = generator.check(request)
        known = generator.inputs.known(request, size)
        (item,), _ = generator.inputs.items([request], [size], [known], None)
        count = len(item.latents) - item.sounds
        assert packed.counts(request) == (count, item.sounds)


def test_footage_is_made_anew_in_a_row(packed):
    request, settings = order(packed, 7, 8, restyle=FILM)
    generator = packed.generator
    how = noised(generator.model, generator.codec, [request], 8, settings.strength)
    assert len(how["levels"]) == 5
    assert_as_alone(packed, [(request, settings)], **how)


def test_a_packed_clip_has_the_watermark_of_a_lone_one(packed, monkeypatch):
    """Its noise is what the library begins with, where nothing is given."""
    orders = [order(packed, 7, 4, image=PICTURE), order(packed, 8, 4)]
    unmarked = run(packed, orders[1:], [0])[0]
    mark = Watermark(b"a key of the tests, long enough")
    monkeypatch.setattr(packed.generator, "watermark", mark)
    request, settings = orders[0]
    clip = packed.enter(request, settings, packed.find(packed.counts(request)))
    noise = packed._read(packed._solution[0], clip).picture
    true = mark.noise(7, noise.shape)
    np.testing.assert_array_equal(noise[1:], true[1:])
    assert not np.allclose(noise[0], true[0])
    packed.leave(clip)
    made = assert_as_alone(packed, orders)
    assert np.abs(made[1] - unmarked).mean() > 0.1


def test_the_same_request_twice_is_two_clips(packed):
    """Requests that are alike hold arrays, which have no truth value."""
    orders = [order(packed, 7, 2, image=PICTURE.copy()) for _ in range(2)]
    first, second = run(packed, orders, [0, 1]).values()
    np.testing.assert_allclose(first, second, atol=1e-3)
    assert not packed.running


def test_channels_beside_the_noise_are_packed(packed):
    """One clip follows edges, and its neighbour has none."""
    orders = [order(packed, 7, 3, edges=FILM), order(packed, 7, 3)]
    made = assert_as_alone(packed, orders)
    assert np.abs(made[0] - made[1]).mean() > 0.01


def test_what_lies_beside_a_clip_counts_for_what_fits(packed, tmp_path):
    (tmp_path / "a.png").write_bytes(png(PICTURE))
    picture, film = [str(tmp_path / "a.png")], str(tmp_path / "film.mp4")
    GeneratedClip(FILM, 8.0).save(film)
    served = Served(packed.generator, "box", tokens=120)
    asked = VideoRequest.of({"prompt": PROMPT}, keyframes=(0.5,))
    paths = {"keyframes": picture, "last_image": picture}
    served.order(asked, paths)  # 80 tokens, and two pictures of 16
    paths["references"] = picture * 2
    with pytest.raises(ValueError, match="144 tokens with `last_image`") as refusal:
        served.order(asked, paths)
    told = str(refusal.value).partition("the largest are ")[2]
    frames = int(told.split()[0])
    assert 1 < frames < 9
    more = VideoRequest.of({"prompt": PROMPT, "num_frames": frames}, keyframes=(0.5,))
    served.order(more, paths)
    odd = VideoRequest.of({"prompt": PROMPT, "num_frames": 7})
    with pytest.raises(ValueError, match="`interpolate` doesn't go with 7 frames"):
        served.order(odd, {"interpolate": [film]})


def test_what_is_not_finite_leaves_no_trace(packed):
    good, bad = order(packed, 3, 3, frames=1), order(packed, 4, 3, frames=1)
    alone = run(packed, [good], [0])[0]
    clip = packed.enter(*bad, packed.find(packed.counts(bad[0])))
    latents, state = packed._solution
    packed._solution = latents.at[0, 0, 0].set(3e38), state
    assert packed.step() == [clip]
    with pytest.raises(ValueError, match="finite"):
        packed.latents(clip)
    packed.leave(clip)
    np.testing.assert_array_equal(run(packed, [good], [0])[0], alone)


def test_what_cannot_be_packed_is_told_apart(packed):
    change = dataclasses.replace
    assert packed.takes(change(packed.settings, steps=3, guidance_scale=1.0))
    assert not packed.takes(change(packed.settings, solver="heun"))
    assert not packed.takes(change(packed.settings, levels=(1.0, 0.5)))
    assert not packed.takes(change(packed.settings, guidance_rescale=0.5))


def test_passes_draw_a_picture_and_then_the_sound():
    request = Request(PROMPT, frames=9, height=32, width=32, fps=8.0, sound=True)
    steps = passes(request, draft=True, sound_after=True)
    clip = type("Clip", (), {"video": np.zeros((9, 32, 32, 3), np.uint8)})
    asked = [next(steps), steps.send(clip), steps.send(clip)]
    assert [x.frames for x in asked] == [1, 9, 9]
    assert [bool(x.sound) for x in asked] == [False, False, True]
    assert [x.image is None for x in asked] == [True, False, True]
    assert asked[2].from_video is clip.video
    with pytest.raises(StopIteration) as end:
        steps.send("all of it")
    assert end.value.value == "all of it"


def test_slots_lie_apart_and_within_blocks():
    shape, taken = RowShape(2, 640, 640, 8, 48, 8, 4), []
    for count in np.random.default_rng(0).integers(1, 300, 40).tolist():
        if (slot := find_slot(shape, taken, (count, 5))) is None:
            continue
        start, count = slot.starts[0], slot.counts[0]
        assert start % 64 == 0 and start + count <= 640
        assert start % 256 == 0 or start % 256 + count <= 256
        for other in taken:
            if other.row == slot.row:
                assert other.number != slot.number
                for kind in range(2):
                    a, b = other.starts[kind], slot.starts[kind]
                    assert a + other.counts[kind] <= b or b + slot.counts[kind] <= a
        taken.append(slot)
    assert {slot.row for slot in taken} == {0, 1}
    assert find_slot(shape, [], (641, 0)) is None


def test_texts_lie_within_blocks():
    rooms = {count: room_of_text(count) for count in (48, 64, 77, 192, 256, 512, 300)}
    assert rooms == {48: 64, 64: 64, 77: 128, 192: 256, 256: 256, 512: 512, 300: 512}


def test_the_oldest_waits_for_the_row_that_is_free_first():
    shape = RowShape(2, 128, 0, 4, 48, 8, 4)
    left = {
        RowSlot(0, 0, (0, 0), (64, 0)): 9,
        RowSlot(0, 1, (64, 0), (64, 0)): 1,
        RowSlot(1, 0, (0, 0), (128, 0)): 5,
    }
    assert soonest(shape, left, (64, 0)) == 0
    assert soonest(shape, left, (128, 0)) == 1


def test_no_younger_clip_delays_the_oldest(packed, tmp_path, monkeypatch):
    def enter(request, settings, slot):
        clip = PackedClip(request, slot, (1, 1, 1), np.zeros(settings.steps + 1), 1.0)
        packed.running.append(clip)
        return clip

    monkeypatch.setattr(packed, "enter", enter)
    monkeypatch.setattr(packed, "_place", lambda: None)
    jobs = Jobs(tmp_path)
    worker = Worker(jobs, Served(packed.generator, "box"), packed)
    sides = [64, 112, 32, 64]  # of pictures: 64, 196, 16 and 64 of 208 tokens
    for side in sides:
        fields = {"prompt": "a", "num_frames": 1, "size": f"{side}x{side}"}
        jobs.add(*jobs.receive({}), VideoRequest.of(fields), {})
    seen = []
    while jobs.waiting():
        worker._admit()
        seen.append([clip.request.height for clip in packed.running])
        for entry in [*worker._entries.values()]:
            if entry.clip is not None:
                worker._take_out(entry)
                worker._entries.pop(entry.job.id)
    assert seen == [[64], [112], [32, 64]]
