"""Sources by a line of text, as configs and command lines name them.

=============================  ==================================================
`world:train:17x64x64@8:5000`  procedural world: split, frames x height x width,
                               frames per second, clips
`world:val:17x64x64@8:64:7`    the same, of another seed (default 0)
`FOLDER`, `FOLDER#val`         prepared data set of clips or latents, and split
`tfds:NAME`, `tfds:NAME#test`  a TFDS data set with encoded videos
=============================  ==================================================
"""

import re

from jvdit.data.record_format import local_path
from jvdit.data.records import RecordDataset
from jvdit.data.sources import (
    LatentSource,
    RecordSource,
    Source,
    TfdsSource,
    WorldSource,
)
from jvdit.data.world import World

_WORLD = re.compile(r"world:(\w+):(\d+)x(\d+)x(\d+)@([\d.]+):(\d+)(?::(\d+))?")


def open_source(name: str, *, audio: bool = False, max_text: int = 64) -> Source:
    """Opens a source by its name.

    Args:
        name: see above.
        audio: whether clips have their sound.
        max_text: text tokens kept of a caption of a latent source.

    Raises:
        ValueError: the name can't be understood, or what it names is damaged.
        FileNotFoundError: there is no such data set.
    """
    if name.startswith("world"):
        match = _WORLD.fullmatch(name)
        if match is None:
            raise ValueError(
                f"source {name!r} must read world:SPLIT:FRAMESxHEIGHTxWIDTH@FPS:CLIPS; "
                "for example world:train:17x64x64@8:100000."
            )
        split, frames, height, width, fps, count, seed = match.groups()
        world = World(
            split=split,
            seed=int(seed or 0),
            frames=int(frames),
            height=int(height),
            width=int(width),
            fps=float(fps),
        )
        return WorldSource(world, int(count), audio=audio)
    if not name:
        raise ValueError(
            "a source is empty; name one, such as world:train:17x64x64@8:100000, the "
            "folder of a prepared data set, or tfds:NAME."
        )
    path, _, split = name.partition("#")
    if path.startswith("tfds:"):
        return TfdsSource(path.removeprefix("tfds:"), split or "train")
    path = str(local_path(path))
    if "mean" in RecordDataset(path, split or "train").features:
        return LatentSource(path, split or "train", max_text=max_text)
    return RecordSource(path, split or "train", audio_rate=16000 if audio else 0)
