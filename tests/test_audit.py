"""The audit of a data set: what is planted in it is found, and nothing else."""

import numpy as np
import pytest

from jvdit.data.sources import ArraySource
from jvdit.data.world import World
from jvdit.evaluation.audit import audit, doubles, flags_of, named, read_terms, spread

FPS = 8.0


@pytest.fixture(scope="module")
def videos():
    world = World("single", 0, 9, 48, 64, fps=FPS)
    return [*world.clips(np.arange(24), audio=False)["video"]]


def source(videos, captions):
    clips = [
        {"video": x, "fps": FPS, "caption": c}
        for x, c in zip(videos, captions, strict=True)
    ]
    return ArraySource(clips)


def test_clips_without_a_fault_have_no_flag(videos):
    assert not any(flags_of({"video": video}) for video in videos)


def test_flags_find_what_is_planted(videos):
    still = np.repeat(videos[0][:1], 9, axis=0)
    cut = np.concatenate([videos[0][:5], 255 - videos[1][5:]])
    dark = videos[0] // 40
    assert flags_of({"video": still}) == ["still"]
    assert flags_of({"video": cut}) == ["cut"]
    assert "black" in flags_of({"video": dark})
    sound = {"video": videos[0], "has_audio": True}
    wave = np.sin(np.arange(8000) / 10)[:, None].astype(np.float32)
    assert flags_of(sound | {"audio": 0.5 * wave}) == []
    assert flags_of(sound | {"audio": 1e-5 * wave}) == ["silent"]
    assert flags_of(sound | {"audio": np.clip(4 * wave, -1, 1)}) == ["clipped"]


def test_doubles_are_found_within_a_split_and_across(videos):
    """The same clip brighter, smaller, noisier; and not its neighbours in the world."""
    rng = np.random.default_rng(0)
    brighter = np.clip(videos[3] * 1.2 + 10, 0, 255).astype(np.uint8)
    noisy = np.clip(videos[5] + rng.normal(0, 2, videos[5].shape), 0, 255)
    train = source([*videos[:12], brighter], [f"clip {i}" for i in range(13)])
    val = source([*videos[12:], noisy.astype(np.uint8)], [f"x {i}" for i in range(13)])
    parts = [audit("train", train, 100), audit("val", val, 100)]
    planted = {("train", 3, "train", 12), ("train", 5, "val", 12)}
    found = {x[:4] for x in doubles(parts)}
    assert planted <= found
    assert len(found - planted) <= 1  # the world has two hardly different clips


def test_counts_are_of_what_was_read(videos):
    captions = ["a man walks"] * 10 + ["a woman and a dog"] * 5 + [""] * 9
    found = audit("all", source(videos, captions), 1000)
    assert (found.clips, found.read) == (24, 24)
    assert found.seconds == pytest.approx(24 * 9 / FPS)
    assert found.sizes == {"9x48x64": 24} and found.rates == {"8": 24}
    assert found.captions["empty"] == 9 and found.captions["different"] == 2
    assert found.captions["most repeated"]["a man walks"] == 10
    assert found.terms["people"]["man"] == 10 and found.terms["animals"]["dog"] == 5
    assert found.together["dog + woman"] == 10  # once as of people, once of gender
    few = audit("few", source(videos, captions), 6)
    assert few.read == 6 and [*few.codes] == [0, 5, 9, 14, 18, 23]


def test_words_are_whole_and_of_any_script():
    counts, pairs = named(["Human, 狗!", "MAN"], {"a": ("man", "狗"), "b": ("human",)})
    assert counts == {"a": {"man": 1, "狗": 1}, "b": {"human": 1}}
    assert pairs == {"human + 狗": 1}


def test_terms_of_ones_own():
    assert read_terms("# mine\n\ncars: Taxi, bus,\n") == {"cars": ("taxi", "bus")}
    with pytest.raises(ValueError, match="line 1.*must read GROUP: WORD"):
        read_terms("taxi bus")
    assert spread(np.array([5, 5])) == pytest.approx(1.0)
    assert spread(np.array([5, 0])) == 0.0
