"""Continuous packing: clips share rows, and know nothing of one another."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from packed_bits import PROMPT, order, rows, run

from jvdit.generation.draft import passes
from jvdit.generation.request import Request
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


def test_a_packed_clip_is_what_the_generator_makes(packed):
    for request, settings in (
        order(packed, 7, 4),
        order(packed, 7, 4, 1.0, frames=5, height=16),
    ):
        made = run(packed, [(request, settings)], [0])[0]
        lone = packed.generator.latents([request], **settings.solving)[0]
        np.testing.assert_allclose(made, lone, atol=1e-3)


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
                worker._forget(entry)
    assert seen == [[64], [112], [32, 64]]
