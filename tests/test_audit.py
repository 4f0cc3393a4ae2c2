"""The audit of a data set: what is planted in it is found, and nothing else."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jvdit.data.sources import ArraySource
from jvdit.data.world import World
from jvdit.evaluation.audit import audit, doubles, flags_of, spread
from jvdit.evaluation.flag_lists import find_lists, named, read_lists

FPS = 8.0
TOOL = pathlib.Path(__file__).parent.parent / "tools/audit_dataset.py"
LISTS = {"people": ("man", "woman"), "animals": ("dog", "cat")}


@pytest.fixture(scope="module")
def videos():
    world = World("single", 0, 9, 48, 64, fps=FPS)
    return [*world.clips(np.arange(24), audio=False)["video"]]


def tool(*args):
    return subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True)


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
    parts = [audit("train", train, 100, LISTS), audit("val", val, 100, LISTS)]
    planted = {("train", 3, "train", 12), ("train", 5, "val", 12)}
    found = {x[:4] for x in doubles(parts)}
    assert planted <= found
    assert len(found - planted) <= 1  # the world has two hardly different clips


def test_counts_are_of_what_was_read(videos):
    captions = ["a man walks"] * 10 + ["a woman and a dog"] * 5 + [""] * 9
    found = audit("all", source(videos, captions), 1000, LISTS)
    assert (found.clips, found.read) == (24, 24)
    assert found.seconds == pytest.approx(24 * 9 / FPS)
    assert found.sizes == {"9x48x64": 24} and found.rates == {"8": 24}
    assert found.captions["empty"] == 9 and found.captions["different"] == 2
    assert found.captions["most repeated"]["a man walks"] == 10
    assert found.lists["people"].words == {"man": 10, "woman": 5}
    assert found.lists["people"].share == 15 / 24
    assert found.lists["animals"].clips == [*range(10, 15)]
    assert found.together == {
        "lists": {"animals + people": 5},
        "words": {"dog + woman": 5},
    }
    few = audit("few", source(videos, captions), 6, LISTS)
    assert few.read == 6 and [*few.codes] == [0, 5, 9, 14, 18, 23]


def test_words_are_whole_and_of_any_script():
    captions = {3: "Human, 狗!", 5: "MAN", 6: "a burger-king, 2 burgers of a king"}
    lists = {"a": ("man", "狗"), "b": ("human",), "c": ("burger king", "7 eleven")}
    found, pairs = named(captions, lists)
    assert found["a"].words == {"man": 1, "狗": 1} and found["a"].clips == [3, 5]
    assert found["b"].words == {"human": 1} and found["b"].clips == [3]
    assert found["c"].words == {"burger king": 1, "7 eleven": 0}
    assert pairs == {"lists": {"a + b": 1}, "words": {"human + 狗": 1}}


def test_lists_are_text_files(tmp_path):
    mine = tmp_path / "cars.txt"
    mine.write_text("# mine\n\nTaxi\nbus stop # a phrase\ntaxi\n")
    assert read_lists([mine]) == {"cars": ("taxi", "bus stop")}
    with pytest.raises(ValueError, match="another list is called 'cars'"):
        read_lists([mine, mine])
    for text, told in (("# none\n", "lists no word"), ("a\n--\n", "line 2")):
        mine.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_lists([mine])
    shipped = TOOL.with_name("flag_lists")
    assert find_lists(["age.txt", str(mine)], shipped) == [shipped / "age.txt", mine]
    with pytest.raises(ValueError, match="one of age, animals, brands"):
        find_lists(["none"], shipped)
    lists = read_lists(find_lists(None, shipped))
    assert {"people", "age", "places", "brands", "unsafe"} < {*lists}
    assert spread(np.array([5, 5])) == pytest.approx(1.0)
    assert spread(np.array([5, 0])) == 0.0


def test_the_tool_flags_what_lists_name(tmp_path):
    """A list of one's own goes beside one that comes with it."""
    (tmp_path / "mine.txt").write_text("red circle\nblue\n")
    lists = f"--flag_lists=people,{tmp_path / 'mine.txt'}"
    done = tool("world:train:9x32x32@8:40", lists, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "audit.json").read_text())
    found = told["sources"][0]["lists"]
    assert [*found] == ["people", "mine"] and "lists are short" in told["limits"]
    assert found["people"]["clips"] == [] and found["mine"]["words"]["blue"] > 0
    assert found["people"]["evenness"] is None  # a NaN would be no JSON
    card = (tmp_path / "audit.html").read_text()
    assert f"blue {found['mine']['words']['blue']}" in card
