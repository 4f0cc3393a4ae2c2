"""The sizes of clips that a config's autoencoder and patches divide."""

import math
import os
import pathlib
import sys
from importlib import util

from absl import logging

from jvdit.config import Config
from jvdit.data.grid import ClipGrid
from jvdit.models.backbones import MODELS
from jvdit.models.video_vae import VARIANTS, VideoVAE
from jvdit.weights.encoders import ClipEncoder
from jvdit.weights.recipes import RECIPES

_USUAL = 4, 8  # temporal and spatial compression, where the autoencoder isn't known


def read_config(path: str | os.PathLike[str]) -> Config:
    """Runs the `get_config` of a Python file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't Python, or has no such function.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} doesn't exist; give one of configs/.")
    sys.path.insert(0, os.getcwd())  # configs import one another
    try:
        spec = util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config()
    except Exception as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"{file} is no config ({type(error).__name__}: {told}); give a Python "
            "file with get_config()."
        ) from error
    finally:
        sys.path.pop(0)


def grid_of(config: Config, vae: VideoVAE | None = None) -> ClipGrid:
    """Which clips a config, of one training or of several stages, can be trained on.

    Args:
        config: the config.
        vae: the autoencoder; None: what the config names. If that isn't there yet, one
            that compresses 4 frames and 8 x 8 pixels is assumed, and that is logged.
    """
    stages = config.stages.values() if "stages" in config else [config]
    patch, units, captions = (1, 1, 1), [], False
    for stage in stages:
        if stage.objective == "flow":
            patch = tuple(map(math.lcm, patch, stage.patch_size))
            captions |= bool(stage.text_encoder) and not stage.tokenizer
        if vae is not None:
            units = [_compression(vae)]
        elif stage.objective == "video_vae":
            units.append(_compression(VideoVAE(**stage.vae)))
        else:
            units += _of_folder(stage)
    time, space = map(math.lcm, *units) if units else _USUAL
    if not units:
        logging.warning(
            "the autoencoder isn't there yet: one that compresses %d frames and %d x "
            "%d pixels is assumed",
            *(time, space, space),
        )
    first = 1 + time * (patch[0] - 1)
    sides = (space * n for n in patch[1:])
    return ClipGrid(first, time * patch[0], *sides, needs_captions=captions)


def _of_folder(stage: Config) -> list[tuple[int, int]]:
    """The compression of the autoencoder that a stage names, if it can be opened."""
    named = (stage.get(name) for name in ("vae", "autoencoder", "start_from"))
    for folder in named:
        if isinstance(folder, str) and os.path.isdir(folder):
            return [_compression(ClipEncoder.load(folder).module)]
    for name in RECIPES if stage.objective == "flow" else ():  # a release to be had
        row = MODELS["dit"].variants[name]
        if all(stage.dit.get(key, value) == value for key, value in row.items()):
            latent = row.get("in_channels", 0) // math.prod(stage.patch_size)
            newer = VARIANTS["wan2.2"]
            vae = newer if newer["latent_channels"] == latent else VARIANTS["wan2.1"]
            return [_compression(VideoVAE(**vae))]
    return []


def _compression(vae: VideoVAE) -> tuple[int, int]:
    return vae.temporal_compression, vae.spatial_compression
