"""The model in the box is packed with the package, small, and draws what it is told."""

import fnmatch
import pathlib
import tomllib
import zlib

import numpy as np

from jvdit.box import FOLDER
from jvdit.data.world import World
from jvdit.evaluation import oracle
from jvdit.generation.generator import Generator
from jvdit.generation.reconstructor import SoundReconstructor
from jvdit.generation.request import Request

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
    # What is downloaded: a wheel is compressed.
    packed = sum(len(zlib.compress((FOLDER / file).read_bytes())) for file in files)
    assert packed <= 20e6


def test_it_draws_what_it_is_told():
    """Clips of scenes that it never saw, judged by the oracle."""
    world = World("single", seed=1, frames=9, height=32, width=32)
    ids = np.arange(6)
    clips = Generator.load()(world.captions(ids), steps=10, draft=False)
    videos = np.stack([clip.video for clip in clips])
    found = oracle.means(oracle.score(videos, world.scenes(ids), world.fps))
    assert min(found["color"], found["count"], found["size"]) > 0.6, found


def test_it_hears_what_it_sees():
    """Bounces of real clips, which the oracle hears in the sound made for them."""
    world = World("single", seed=1, frames=9, height=32, width=32)
    heard = np.abs(world.clips(np.arange(40))["audio"]).max(axis=(1, 2)) > 0.01
    ids = np.flatnonzero(heard)[:8]
    generator, real = Generator.load(), world.clips(ids)["video"]
    captions = zip(world.captions(ids), real, strict=True)
    requests = [Request(x, from_video=video) for x, video in captions]
    audio = np.stack([clip.audio[:, 0] for clip in generator(requests, steps=10)])
    found = oracle.means(oracle.score(real, world.scenes(ids), world.fps, audio))
    assert found["sync_frame"] > 0.5, found


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
