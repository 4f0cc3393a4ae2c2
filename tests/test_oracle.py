"""The oracle tells real clips of the world from each way of getting them wrong."""

import functools

import av
import numpy as np
import pytest

from jvdit.data.media.writer import encode_clip
from jvdit.data.world import World
from jvdit.evaluation import oracle
from jvdit.evaluation.detection import detect
from jvdit.evaluation.sound import match, onsets

CLIPS = np.arange(96)
SIZES = [(17, 64, 64, 8.0), (17, 32, 32, 16.0), (17, 48, 80, 8.0), (33, 64, 64, 16.0)]


@functools.cache
def world(split="val", size=SIZES[0]):
    frames, height, width, fps = size
    made = World(split, 0, frames, height, width, fps)
    scenes = made.scenes(CLIPS)
    motion = made.simulate(scenes)
    video, audio = made.render(scenes, motion), made.synthesize(scenes, motion)
    return made, scenes, video, audio[..., 0]


@functools.cache
def real(split="val", size=SIZES[0]):
    made, scenes, video, audio = world(split, size)
    return oracle.means(oracle.score(video, scenes, made.fps, audio))


def changed(video=None, audio=None):
    made, scenes, pictures, sound = world()
    if video is not None:
        pictures = video(pictures)
    if audio is not None:
        sound = audio(sound)
    return oracle.means(oracle.score(pictures, scenes, made.fps, sound))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_real_clips_reach_the_bound_at_every_size(size):
    found = real(size=size)
    assert found["count"] == found["color"] == 1 and found["moving"] > 0.98
    assert min(found[name] for name in ("shape", "size", "direction")) > 0.97
    assert found["all"] > 0.95 and found["physics"] > 0.78 and found["sync"] > 0.8
    assert found["flicker"] < 0.002 and found["teleport"] == 0
    assert found["sync_40ms"] > 0.8 and found["material"] > 0.9


@pytest.mark.parametrize("split", ["comp", "ood_speed", "ood_size", "ood_count"])
def test_real_clips_of_other_splits_reach_the_bound(split):
    found = real(split)
    assert found["color"] > 0.97 and found["direction"] > 0.95
    assert found["shape"] > 0.95 and found["physics"] > 0.75
    # Sizes of ood_size are still small and large, and told apart.
    assert found["size"] > 0.97 and found["count"] > 0.95


def test_frames_out_of_order_move_wrongly():
    order = np.random.RandomState(0).permutation(17)
    found = changed(video=lambda v: v[:, order])
    assert found["physics"] == 0 and found["teleport"] > 0.8
    assert found["direction"] < 0.5 and found["all"] < 0.3
    assert found["shape"] > 0.95 and found["permanence"] < 0.1


def test_time_reversed_sets_out_in_another_direction():
    found = changed(video=lambda v: v[:, ::-1])
    assert found["direction"] < 0.5 and found["all"] < 0.4 and found["sync"] < 0.2


def test_frozen_clips_do_not_move():
    found = changed(video=lambda v: np.repeat(v[:, :1], 17, axis=1))
    assert max(found["physics"], found["all"], found["moving"]) < 0.05
    assert found["direction"] < 0.05 and found["shape"] > 0.95


def test_noise_shows_nothing():
    rng = np.random.RandomState(0)
    found = changed(video=lambda v: rng.randint(0, 256, v.shape).astype(np.uint8))
    assert found["all"] == found["physics"] == 0
    assert found["color"] < 0.1 and found["flicker"] > 0.1


def test_captions_of_other_clips_are_not_obeyed():
    found = changed(video=lambda v: np.roll(v, 1, axis=0))
    assert found["all"] < 0.03 and found["color"] < 0.4 and found["direction"] < 0.1


def test_weak_bounces_are_seen():
    made, scenes, _, _ = world()
    tired = made.simulate(scenes, restitution=0.6)
    found = oracle.means(oracle.score(made.render(scenes, tired), scenes, made.fps))
    assert found["restitution"] == pytest.approx(0.6, abs=0.06)
    assert found["physics"] < 0.1 and found["explained"] > 0.9
    assert "sync" not in found, "without sound there are no rows of sound"


def test_jitter_is_not_smooth():
    by = np.random.RandomState(0).randint(-2, 3, (17, 2))

    def shake(video):
        moved = [np.roll(video[:, t], by[t], (1, 2)) for t in range(17)]
        return np.stack(moved, 1)

    found = changed(video=shake)
    assert found["residual"] > 1 > 2 * real()["residual"]
    assert found["physics"] < 0.05


def test_an_object_that_vanishes_behind_the_bar_is_not_permanent():
    made = World("val")
    ids = np.flatnonzero(made.scenes(np.arange(1500)).bar)[:48]
    scenes = made.scenes(ids)
    video = made.render(scenes, made.simulate(scenes))
    assert np.nanmean(oracle.score(video, scenes, 8.0)["permanence"]) > 0.95
    gone = video.copy()
    gone[:, 9:] = made.render(
        oracle.dataclasses.replace(scenes, count=np.zeros_like(scenes.count)),
        made.simulate(scenes),
    )[:, 9:]
    assert np.nanmean(oracle.score(gone, scenes, 8.0)["permanence"]) < 0.3


def test_a_second_object_of_the_same_color_is_counted():
    _, scenes, video, _ = world()
    rows = np.flatnonzero((scenes.count == 1) & (scenes.size[:, 0] == 0))
    rows = rows[(scenes.pan[rows] == 0) & (scenes.tone[rows] == 0)]
    twin = np.maximum(video[rows], video[rows][:, :, :, ::-1])
    apart = np.abs(scenes.position[rows, 0, 0] - 0.5) > 0.2
    found = detect(twin[apart])
    color = scenes.color[rows, 0][apart]
    pieces = found.pieces[np.arange(len(color)), 0, color]
    assert (pieces == 2).mean() > 0.9


def test_sound_of_other_clips_is_out_of_step():
    found = changed(audio=lambda a: np.roll(a, 1, axis=0))
    assert found["sync"] < 0.1 and found["material"] < 0.3
    assert found["sync_40ms"] < 0.3 and found["physics"] == real()["physics"]


def test_coarse_h264_blurs_edges_and_little_else(tmp_path):
    def coded(video):
        return np.stack([coarse(clip, tmp_path / "clip.mp4") for clip in video])

    def coarse(clip, path):
        encode_clip(path, clip, 8.0, crf=28)
        with av.open(path) as file:
            frames = file.decode(video=0)
            return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])

    found, bound = changed(video=coded), real()
    assert 0.7 < found["all"] < bound["all"] and 0.5 < found["physics"] < 0.9
    assert found["direction"] > 0.9 and found["sync"] > 0.8
    assert bound["residual"] < found["residual"] < 0.5
    assert bound["flicker"] < found["flicker"] < 0.01


def test_late_sound_is_late():
    found = changed(audio=lambda a: np.pad(a, ((0, 0), (960, 0)))[:, : a.shape[1]])
    assert found["delay"] == pytest.approx(0.06, abs=0.01)
    assert found["lag"] == pytest.approx(0.06, abs=0.01)
    assert found["sync"] < 0.05 and found["sync_frame"] > 0.8


def test_silence_has_no_onsets():
    assert [len(x) for x in onsets(np.zeros((2, 16000), np.float32), 16000)] == [0, 0]


def test_matching_is_one_to_one_and_nearest_first():
    pairs = match(np.array([0.0, 0.1]), np.array([0.09, 0.5]))
    assert [(i, j) for i, j, _ in pairs] == [(1, 0), (0, 1)]
    assert match(np.array([]), np.array([0.3])) == []


def test_scores_of_clips_are_independent():
    made, scenes, video, audio = world()
    together = oracle.score(video[:9], oracle.choose(scenes, slice(9)), 8.0, audio[:9])
    alone = oracle.score(
        video[8:9], oracle.choose(scenes, np.array([8])), 8.0, audio[8:9]
    )
    for name, values in alone.items():
        np.testing.assert_allclose(values, together[name][8:9], err_msg=name)


def test_what_cannot_be_scored_is_refused():
    made, scenes, video, _ = world()
    with pytest.raises(ValueError, match="95 clips.*96 scenes"):
        oracle.score(video[:95], scenes, 8.0)
    with pytest.raises(ValueError, match="2 frames"):
        oracle.score(video[:, :2], scenes, 8.0)


def test_the_interval_holds_the_mean():
    values = np.append(np.random.RandomState(0).rand(400), np.nan)
    mean, low, high = oracle.mean_and_interval(values)
    assert low < mean < high and high - low == pytest.approx(4 * 0.29 / 20, rel=0.1)
