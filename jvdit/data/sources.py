"""Random-access sources of clips: the world, record and TFDS data sets, arrays.

A source knows the size of every clip before it reads one, which is all that a plan
needs. What cannot be read comes back as a `BadClip`, in its place: a step has the
clips that its plan says, on every host, whatever the disks hold.

Configs and command lines name a source by a line of text, see `open_source`:

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvdit.data.clips import SIZE, BadClip, Clip, Ids, Indexed, Source, make_index
from jvdit.data.ingest.listing import holds_videos
from jvdit.data.latent_source import LatentSource
from jvdit.data.manifest import Manifest, dataset_directory, read_manifest
from jvdit.data.order import fingerprint
from jvdit.data.tfds_source import TfdsSource
from jvdit.data.video_sources import RecordSource
from jvdit.data.world import World
from jvdit.machine.files import local_path


class ArraySource(Indexed):
    """Clips that are in memory already, for what is small.

    Args:
        clips: clips of pixels or of latents, as `Source.read` returns them.
        text_length: text tokens kept for each caption, one number or one a clip. None:
            the length of `text_embeds`, or where there are none a bound from the number
            of characters.
    """

    def __init__(
        self, clips: Sequence[Clip], text_length: int | Sequence[int] | None = None
    ):
        self._clips = list(clips)
        arrays = [clip["mean" if "mean" in clip else "video"] for clip in clips]
        sizes = np.array([x.shape[:3] for x in arrays]).reshape(-1, 3)
        if text_length is None:
            embeds = [clip.get("text_embeds") for clip in clips]
            text_length = [
                len(clip.get("caption", "")) + 2 if states is None else len(states)
                for clip, states in zip(clips, embeds, strict=True)
            ]
        self.index = make_index(
            len(clips),
            **dict(zip(SIZE, sizes.T, strict=True)),
            fps=[clip["fps"] for clip in clips],
            has_audio=[clip.get("audio") is not None for clip in clips],
            text_length=text_length,
        )
        sums = [float(np.sum(x, dtype=np.float64)) for x in arrays]
        told = [clip.get("caption", "") for clip in clips]
        self.fingerprint = fingerprint("arrays", sizes.tolist(), sums, told)

    def _read_one(self, i: int) -> Clip:
        return dict(self._clips[i])


_MOST_CLIPS = 10**8  # an index of so many has 2 GB


class WorldSource(Indexed):
    """Clips of the procedural world, rendered when they are read.

    Args:
        world: split, size and rates.
        num_clips: how many clips of the split, from the first.
        audio: whether to render the sound.
        beside: what else to read of each clip, see `Source.read`.

    Raises:
        ValueError: there are none, or more than an index has room for.
    """

    def __init__(
        self,
        world: World,
        num_clips: int,
        *,
        audio: bool = True,
        beside: Sequence[str] = (),
    ):
        if not 0 < num_clips <= _MOST_CLIPS:
            raise ValueError(
                f"`num_clips` (={num_clips}) of the world must be from 1 to "
                f"{_MOST_CLIPS}."
            )
        self.world = world
        self._audio, self.beside = audio, tuple(beside)
        columns = {name: getattr(world, name) for name in (*SIZE, "fps")}
        self.index = make_index(num_clips, has_audio=audio, **columns)
        self.fingerprint = fingerprint("world", repr(world), num_clips, audio, *beside)

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips in the order asked for, rendered together."""
        ids = np.asarray(ids, np.int64)
        clips = self.world.clips(ids, audio=self._audio, beside=self.beside)
        rate = self.world.audio_rate if self._audio else 0
        same = {"fps": float(self.world.fps), "audio_rate": rate}
        names = ("video", "caption", "audio", *self.beside)
        return [{k: clips[k][i] for k in names} | same for i in range(len(ids))]


_SIZE = r"(\d+)x(\d+)x(\d+)@([\d.]+)"
_WORLD = re.compile(rf"world:(\w+):{_SIZE}:(\d+)(?::(\d+))?")
_SPLIT = re.compile(rf"(\w*)(?::{_SIZE})?(?::(\d+))?")


def open_source(
    name: str,
    *,
    audio_rate: int = 0,
    max_text: int = 64,
    pad_text: bool = False,
    beside: Sequence[str] = (),
) -> Source:
    """Opens a source by its name.

    Args:
        name: see above.
        audio_rate: Hz of the clips' sound; 0: they have none.
        max_text: text tokens kept of a caption of a latent source.
        pad_text: whether each of its captions has room for as many.
        beside: what else to read of each clip of pixels, see `Source.read`.

    Raises:
        ValueError: the name can't be understood, or what it names is damaged.
        FileNotFoundError: there is no such data set.
    """
    if _is_world(name):
        return _world(name, audio_rate, beside)
    if not name:
        raise ValueError(
            "a source is empty; name one, such as world:train:17x64x64@8:100000, the "
            "folder of a prepared data set, or tfds:NAME."
        )
    path, part = _divided(name)
    match = _SPLIT.fullmatch(part)
    if match is None:
        raise ValueError(
            f"source {name!r} must read FOLDER, FOLDER#SPLIT, FOLDER#SPLIT:FRAMES or "
            "FOLDER#SPLIT:FRAMESxHEIGHTxWIDTH@FPS; for example clips#train:5x64x96@8."
        )
    split = match[1] or "train"
    options: dict[str, Any] = {"audio_rate": audio_rate, "beside": tuple(beside)}
    if match[2]:
        options |= zip(SIZE, map(int, match.groups()[1:4]), strict=True)
        options |= {"fps": float(match[5]), "windows": "all"}
    foreign = path.startswith("tfds:")
    if foreign or "mean" not in _manifest(path).plan.features:
        if match[6]:
            raise ValueError(f"source {name!r} holds no latents; give FRAMESxHxW@FPS.")
        kind = TfdsSource if foreign else RecordSource
        return kind(path.removeprefix("tfds:"), split, **options)
    if match[2]:
        raise ValueError(
            f"source {name!r} holds latents, whose size is what it is; only the first "
            f"frames can be taken: {path}#{split}:{match[2]}."
        )
    frames = int(match[6]) if match[6] else None
    return LatentSource(path, split, max_text, pad_text, frames)


def source_folder(name: str) -> Path:
    """The folder of a source that is a prepared data set."""
    return local_path(_divided(name)[0])


def _is_world(name: str) -> bool:
    return name.partition(":")[0] == "world"


def _divided(name: str) -> tuple[str, str]:
    """A source's folder, which may have a # in its own name, and what follows it."""
    if "#" not in name or local_path(name).exists():
        return name, ""
    path, _, part = name.rpartition("#")
    return path, part


def _manifest(path: str) -> Manifest:
    """Returns the manifest of a prepared data set, unless its folder is of videos."""
    directory, folder = dataset_directory(path), local_path(path)
    if not (directory / "manifest.json").exists() and holds_videos(folder):
        raise ValueError(
            f"{folder} holds videos, and no data set of clips; run `python "
            f"tools/prepare_clips.py {folder} --out CLIPS …` first, and give CLIPS."
        )
    return read_manifest(directory)


def origin(name: str) -> str:
    """The name of the source that a source's latents were encoded from, else its own.

    Args:
        name: the name of a source that can be opened.
    """
    if _is_world(name) or name.startswith("tfds:"):
        return name
    path, part = _divided(name)
    split = part.partition(":")[0] or "train"
    return _manifest(path).plan.settings.get("origins", {}).get(split, name)


def world_of(name: str) -> tuple[World, int] | None:
    """The world, and the number of clips, that a source names; None: another source."""
    if not _is_world(name):
        return None
    source = _world(name, 0)
    return source.world, len(source)


def _world(name: str, audio_rate: int, beside: Sequence[str] = ()) -> WorldSource:
    match = _WORLD.fullmatch(name)
    if match is None:
        raise ValueError(
            f"source {name!r} must read world:SPLIT:FRAMESxHEIGHTxWIDTH@FPS:CLIPS; "
            "for example world:train:17x64x64@8:100000."
        )
    split, *sizes, fps, count, seed = match.groups()
    sounds = {"audio_rate": audio_rate} if audio_rate else {}
    world = World(split, int(seed or 0), *map(int, sizes), fps=float(fps), **sounds)
    return WorldSource(world, int(count), audio=bool(audio_rate), beside=beside)
