"""Sizes that a model won't take are refused before the work, with the nearest."""

import numpy as np
import pytest
from absl import logging
from test_ingest import run_tool

from jvdit.data.grid import ClipGrid
from jvdit.data.media.writer import encode_clip
from jvdit.data.records import RecordDataset
from jvdit.models.video_vae import VARIANTS, VideoVAE
from jvdit.tasks.config_grid import grid_of, read_config
from jvdit.tasks.encoding import encode
from jvdit.weights.encoders import ClipEncoder

BOX = "jvdit/box"


def test_the_nearest_size_is_named_and_fits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first, period, height, width = map(int, rng.integers(1, 40, 4))
        grid = ClipGrid(first, period, height, width)
        size = [int(x) for x in rng.integers(1, 100, 3)]
        while found := grid.faults(*size):
            name, told = found[0].split("`")[1], found[0].split("try ")[1]
            at = ["frames", "height", "width"].index(name)
            near = [int(x) for x in told.split(" or ")]
            unit = (period, height, width)[at]
            assert any(0 < abs(x - size[at]) <= max(unit, first) for x in near)
            size[at] = near[-1]
        assert size[0] >= first and (size[0] - first) % period == 0
        assert size[1] % height == size[2] % width == 0


@pytest.mark.parametrize(
    "name, period, side, captions",
    [
        ("clips_vae", 4, 4, False),
        ("clips_dit", 4, 16, True),
        ("quickstart", 2, 8, True),
        ("wan_lora", 4, 32, False),
        ("wan_experts_lora", 4, 16, False),
    ],
)
def test_a_config_says_what_it_takes(name, period, side, captions):
    grid = grid_of(read_config(f"configs/{name}.py"))
    assert grid == ClipGrid(1, period, side, side, captions)
    vae = VideoVAE(**VARIANTS["wan2.2"])
    patch = 1 if name == "clips_vae" else 2
    assert grid_of(read_config(f"configs/{name}.py"), vae).width == 16 * patch


def test_what_is_no_config_is_told_in_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="doesn't exist; give one of configs/"):
        read_config(tmp_path / "x.py")
    for text in ("def get_config(", "x = 1", "import nowhere\n", "raise KeyError('a')"):
        (tmp_path / "x.py").write_text(text)
        with pytest.raises(
            ValueError, match="x.py is no config .*get_config"
        ) as caught:
            read_config(tmp_path / "x.py")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 255, (2, 12, 64, 64, 3))
    for k, video in enumerate(noise.astype(np.uint8)):
        encode_clip(folder / f"{k}.mp4", video, 8)
    return folder


def test_prepare_clips_says_so_before_the_work(videos, tmp_path):
    options = "--frames 10 --fps 8 --size 36x48 --audio-rate 0 --workers 1".split()
    out = ["--out", tmp_path / "clips", *options]
    done = run_tool(videos, *out, "--for", "configs/clips_dit.py")
    assert done.returncode == 2 and not (tmp_path / "clips").exists()
    assert "`frames` (=10)" in done.stderr and "try 9 or 13" in done.stderr
    assert "`height` (=36) must be a multiple of 16; try 32" in done.stderr
    options = "--for configs/clips_dit.py --frames 9 --size 32x48".split()
    done = run_tool(videos, *out, *options)
    assert done.returncode == 2 and "none of the videos has a caption" in done.stderr
    assert not (tmp_path / "clips").exists()
    done = run_tool(videos, *out)
    assert done.returncode == 0 and "2 clips have no caption" in done.stdout
    assert "warning: for most models, `frames` (=10)" in done.stderr
    assert "warning: none of the videos has a caption" in done.stderr
    assert len(RecordDataset(tmp_path / "clips")) == 2


def test_encode_says_so_before_the_work(videos, tmp_path, monkeypatch):
    options = "--frames 9 --fps 8 --size 36x40 --audio-rate 0 --workers 1".split()
    assert not run_tool(videos, "--out", tmp_path / "clips", *options).returncode
    clips = str(tmp_path / "clips")
    told = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *more: told.append(text % more)
    )
    monkeypatch.setattr(ClipEncoder, "__call__", None)  # nothing is encoded
    with pytest.raises(TypeError):
        encode(clips, BOX, str(tmp_path / "a"))
    assert told[0] == f"none of the clips of {clips} has a caption"
    assert "`height` (=36) must be a multiple of 8; try 32" in told[1]
    with pytest.raises(ValueError, match="has a caption, and the training of .* needs"):
        encode(clips, BOX, str(tmp_path / "b"), config="configs/quickstart.py")
    with pytest.raises(ValueError, match="isn't for .*wan_lora.py: `height` .=36."):
        encode(clips, BOX, str(tmp_path / "b"), config="configs/wan_lora.py")
    world = "world:train:9x36x40@8:4"
    with pytest.raises(ValueError, match=f"{world} isn't for configs/quickstart.py"):
        encode(world, BOX, str(tmp_path / "b"), config="configs/quickstart.py")
    assert not (tmp_path / "b").exists()
