"""Sources by a line of text, as configs and command lines name them.

=============================  ==================================================
`world:train:17x64x64@8:5000`  procedural world: split, frames x height x width,
                               frames per second, clips
`world:val:17x64x64@8:64:7`    the same, of another seed (default 0)
`FOLDER`, `FOLDER#val`         prepared data set of clips or latents, and split
`FOLDER#train:5x64x96@8`       all windows of that size, of a data set of clips
`FOLDER#train:5`               at most the first 5 frames of each, of one of latents;
                               1: they are pictures
`tfds:NAME`, `tfds:NAME#test`  a TFDS data set with encoded videos
=============================  ==================================================
"""

import re
from typing import Any

from jvdit.data.clips import SIZE, Source
from jvdit.data.records import RecordDataset
from jvdit.data.sources import LatentSource, RecordSource, TfdsSource, WorldSource
from jvdit.data.world import World
from jvdit.machine.files import local_path

_SIZE = r"(\d+)x(\d+)x(\d+)@([\d.]+)"
_WORLD = re.compile(rf"world:(\w+):{_SIZE}:(\d+)(?::(\d+))?")
_SPLIT = re.compile(rf"(\w*)(?::{_SIZE})?(?::(\d+))?")


def open_source(
    name: str, *, audio: bool = False, max_text: int = 64, pad_text: bool = False
) -> Source:
    """Opens a source by its name.

    Args:
        name: see above.
        audio: whether clips have their sound.
        max_text: text tokens kept of a caption of a latent source.
        pad_text: whether each of its captions has room for as many.

    Raises:
        ValueError: the name can't be understood, or what it names is damaged.
        FileNotFoundError: there is no such data set.
    """
    if name.startswith("world"):
        return _world(name, audio)
    if not name:
        raise ValueError(
            "a source is empty; name one, such as world:train:17x64x64@8:100000, the "
            "folder of a prepared data set, or tfds:NAME."
        )
    path, _, part = name.partition("#")
    match = _SPLIT.fullmatch(part)
    if match is None:
        raise ValueError(
            f"source {name!r} must read FOLDER, FOLDER#SPLIT, FOLDER#SPLIT:FRAMES or "
            "FOLDER#SPLIT:FRAMESxHEIGHTxWIDTH@FPS; for example clips#train:5x64x96@8."
        )
    split = match[1] or "train"
    options: dict[str, Any] = {"audio_rate": 16000 if audio else 0}
    if match[2]:
        options |= zip(SIZE, map(int, match.groups()[1:4]), strict=True)
        options |= {"fps": float(match[5]), "windows": "all"}
    tfds = path.startswith("tfds:")
    path = path.removeprefix("tfds:") if tfds else str(local_path(path))
    if tfds or "mean" not in RecordDataset(path, split).features:
        if match[6]:
            raise ValueError(f"source {name!r} holds no latents; give FRAMESxHxW@FPS.")
        return (TfdsSource if tfds else RecordSource)(path, split, **options)
    if match[2]:
        raise ValueError(
            f"source {name!r} holds latents, whose size is what it is; only the first "
            f"frames can be taken: {path}#{split}:{match[2]}."
        )
    frames = int(match[6]) if match[6] else None
    return LatentSource(path, split, max_text, pad_text, frames)


def origin(name: str) -> str:
    """The name of the source that a source's latents were encoded from, else its own.

    Args:
        name: the name of a source that can be opened.
    """
    path, _, part = name.partition("#")
    if name.startswith(("world", "tfds:")):
        return name
    split = part.partition(":")[0] or "train"
    settings = RecordDataset(str(local_path(path)), split).settings
    return settings.get("origins", {}).get(split, name)


def world_of(name: str) -> tuple[World, int] | None:
    """The world, and the number of clips, that a source names; None: another source."""
    if not name.startswith("world"):
        return None
    source = _world(name, audio=False)
    return source.world, len(source)


def _world(name: str, audio: bool) -> WorldSource:
    match = _WORLD.fullmatch(name)
    if match is None:
        raise ValueError(
            f"source {name!r} must read world:SPLIT:FRAMESxHEIGHTxWIDTH@FPS:CLIPS; "
            "for example world:train:17x64x64@8:100000."
        )
    split, *sizes, fps, count, seed = match.groups()
    world = World(split, int(seed or 0), *map(int, sizes), fps=float(fps))
    return WorldSource(world, int(count), audio=audio)
