"""The model in the box is packed with the package, small, and draws what it is told."""

import fnmatch
import pathlib
import tomllib

import numpy as np

from jvdit.box import FOLDER
from jvdit.data.world import World
from jvdit.evaluation import oracle
from jvdit.generation.generator import Generator
from jvdit.generation.reconstructor import SoundReconstructor

ROOT = pathlib.Path(__file__).parent.parent


def test_it_is_packed_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["jvdit.box"]
    files = [x.relative_to(FOLDER) for x in FOLDER.rglob("*") if x.is_file()]
    files = [x for x in files if x.suffix not in (".py", ".pyc")]
    assert {"README.md", "generator.json", "tokenizer.model"} <= {*map(str, files)}
    for file in files:
        # As setuptools globs: a star doesn't cross folders.
        assert any(
            fnmatch.fnmatch(str(file), x) and x.count("/") == len(file.parts) - 1
            for x in patterns
        ), file
    assert sum((FOLDER / file).stat().st_size for file in files) <= 22e6


def test_it_draws_what_it_is_told():
    """Clips of scenes that it never saw, judged by the oracle."""
    world = World("single", seed=1, frames=9, height=32, width=32)
    ids = np.arange(6)
    clips = Generator.load()(world.captions(ids), steps=10, draft=False)
    videos = np.stack([clip.video for clip in clips])
    found = oracle.means(oracle.score(videos, world.scenes(ids), world.fps))
    assert min(found["color"], found["count"], found["size"]) > 0.6, found


def test_its_sounds_come_back_in_step():
    """Through the autoencoder of sound, as the oracle hears them."""
    world = World("test", seed=1, frames=17, height=32, width=32)
    ids = np.arange(16)
    clips, scenes = world.clips(ids), world.scenes(ids)
    reconstruct = SoundReconstructor(FOLDER / "audio_vae")
    decoded = np.stack([reconstruct(x) for x in clips["audio"]])
    real, found = (
        oracle.means(oracle.score(clips["video"], scenes, world.fps, x[..., 0]))
        for x in (clips["audio"], decoded)
    )
    for name in ("sync_40ms", "material"):
        assert found[name] >= 0.95 * real[name] > 0.8, name
