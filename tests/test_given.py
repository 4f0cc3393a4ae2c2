"""Measures of clips that continue, follow or fill what is given, and of long ones."""

import dataclasses

import numpy as np
import pytest

from jvdit.data.world import World
from jvdit.evaluation import given, long_clips, oracle

LONG = World("val", 3, 64, 64, 64, 16.0)


@pytest.fixture(scope="module")
def clips():
    scenes = LONG.scenes(np.arange(48))
    scenes = scenes.choose(np.flatnonzero(~scenes.bar))
    motion = LONG.simulate(scenes)
    video, audio = LONG.render(scenes, motion), LONG.synthesize(scenes, motion)
    return scenes, motion, video, audio[..., 0]


def tracks_of(video, scenes):
    return oracle.observe(video, scenes, LONG.fps)


def test_a_right_continuation_stays_where_it_should(clips):
    scenes, _, video, _ = clips
    tracks = tracks_of(video[:, :24], scenes).tracks
    assert np.nanquantile(given.position_error(tracks, scenes, LONG.fps), 0.95) < 0.1
    assert np.nanmedian(given.velocity_jump(tracks, scenes, LONG.fps, 8)) < 0.1


def test_a_wrong_continuation_is_the_farther_away_the_later(clips):
    scenes, motion, video, _ = clips
    slower = dataclasses.replace(scenes, velocity=0.6 * scenes.velocity)
    other = LONG.render(slower, LONG.simulate(slower))
    # The first 8 frames are right, and what follows moves on too slowly from frame 0.
    mixed = np.concatenate([video[:, :8], other[:, 8:24]], 1)
    tracks = tracks_of(mixed, scenes).tracks
    error = np.nanmean(given.position_error(tracks, scenes, LONG.fps), 0)
    assert error[:8].max() < 0.1 < 0.5 < error[8] < error[16]
    assert np.nanmedian(given.velocity_jump(tracks, scenes, LONG.fps, 8)) > 0.5


def test_what_is_kept_is_measured_where_it_is_given(clips):
    _, _, video, _ = clips
    video = video[:2, :4]
    where = np.zeros(video.shape[:-1], bool)
    where[0, :2] = True
    noisy = video.copy()
    noisy[:, 2:] = 255 - noisy[:, 2:]
    psnr = given.kept(noisy, video, where)
    assert psnr[0] > 70 and np.isnan(psnr[1])
    assert given.kept(255 - video, video, where)[0] < 20


def test_paths_and_masks_are_followed_or_not(clips):
    scenes, motion, video, _ = clips
    seen = tracks_of(video[:, :24], scenes)
    times = np.arange(24) / LONG.fps
    path = motion.positions(times)[seen.tracks.clip, :, seen.tracks.slot]
    right, wrong = (
        np.nanmedian(given.path_error(seen.tracks, x)) for x in (path, path[:, ::-1])
    )
    assert right < 0.05 < 1 < wrong
    masks = seen.found.objects
    assert (given.mask_overlap(seen.found, masks) == 1).all()
    assert given.mask_overlap(seen.found, np.roll(masks, 16, 2)).mean() < 0.4


def test_real_clips_stay_the_same_in_every_window(clips):
    scenes, _, video, _ = clips
    found = [oracle.means(x) for x in long_clips.windows(video, scenes, LONG.fps)]
    assert len(found) == 2
    for name in ("count", "lasting", "color", "shape", "size", "physics"):
        assert min(window[name] for window in found) > 0.9, name


def test_real_clips_do_not_drift(clips):
    scenes, _, video, audio = clips
    steady = scenes.light == 0
    found = long_clips.drifts(video, scenes, LONG.fps, audio)
    assert np.nanmedian(np.abs(found["energy"])) < 0.05
    assert np.nanquantile(np.abs(found["radius"]), 0.9) < 0.02
    assert np.abs(found["brightness"][steady]).max() < 0.01
    assert found["identity"].mean() > 0.99


def test_clips_that_tire_shrink_or_darken_drift(clips):
    scenes, motion, video, audio = clips
    tired = LONG.render(scenes, LONG.simulate(scenes, restitution=0.7))
    energy = long_clips.drifts(tired, scenes, LONG.fps)["energy"]
    assert np.nanmedian(energy) < -0.15
    fade = np.exp(-0.2 * np.arange(LONG.frames) / LONG.fps)
    darker = (video * fade[:, None, None, None]).astype(np.uint8)
    quiet = audio * np.repeat(fade, audio.shape[1] // LONG.frames)
    found = long_clips.drifts(darker, scenes, LONG.fps, quiet)
    steady = scenes.light == 0
    assert found["brightness"][steady] == pytest.approx(-0.2, abs=0.05)
    as_loud = long_clips.drifts(video, scenes, LONG.fps, audio)["loudness"]
    assert np.median(found["loudness"] - as_loud) == pytest.approx(-0.2, abs=0.05)
