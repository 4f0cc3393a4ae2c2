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

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jvdit.data.cameras import parse_camera
from jvdit.data.clips import SIZE, BadClip, Clip, Ids, Indexed, Source, make_index
from jvdit.data.conditions.beside import PRESENCE, VIEWS
from jvdit.data.ingest.listing import holds_videos
from jvdit.data.media.reader import MediaError, decode_clip, probe
from jvdit.data.order import fingerprint
from jvdit.data.records import RecordDataset, dataset_directory
from jvdit.data.world import World
from jvdit.machine.files import cache_folder, local_path
from jvdit.machine.json_files import read_json, write_json


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


# What may lie beside the file of a clip, and how that ends.
SIDECARS = {"guide": ".guide.mp4", "camera": ".camera.json"}
_LACKS = (
    "none of the clips of {0} has a {name}; put NAME{suffix} beside NAME.mp4, prepare "
    "the clips anew, or leave out the view."
)

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
        self.fingerprint = fingerprint(
            "world", repr(world), num_clips, audio, *self.beside
        )

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips in the order asked for, rendered together."""
        clips = self.world.clips(
            np.asarray(ids, np.int64), audio=self._audio, beside=self.beside
        )
        rate = self.world.audio_rate if self._audio else 0
        same = {"fps": float(self.world.fps), "audio_rate": rate}
        names = ("video", "caption", "audio", *self.beside)
        columns = (clips[name] for name in names)
        return [
            dict(zip(names, clip, strict=True)) | same
            for clip in zip(*columns, strict=True)
        ]


class VideoWindows(Indexed):
    """Windows of encoded videos, decoded when they are read.

    Args:
        videos: index of whole videos.
        frames: of a clip. None: all that the video has.
        height, width: pixels; the video is scaled to cover the size and cropped. None:
            as is.
        fps: frames per second of a clip. None: those of the video.
        windows: "first": one clip a video, from its start; "all": as many clips, one
            after another, as fit.
        audio_rate: Hz of the sound; 0: none.
        beside: what else to read of each clip, see `Source.read`.

    Attributes:
        left_out: number of videos that are shorter than a window.

    Raises:
        ValueError: no video is long enough, or `windows` is unknown.
    """

    def __init__(
        self,
        videos: Mapping[str, np.ndarray],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        windows: str = "first",
        audio_rate: int = 0,
        beside: Sequence[str] = (),
    ):
        if windows not in ("first", "all"):
            raise ValueError(f"`windows` (={windows!r}) must be 'first' or 'all'.")
        rate = videos["fps"] if fps is None else np.full(len(videos["fps"]), fps)
        length = np.floor(videos["frames"] / videos["fps"] * rate + 1e-6)
        if frames is not None:
            length = np.full(len(rate), frames)
        # Half a frame of tolerance: the nearest frame is shown.
        fitting = (videos["frames"] + 0.5) / videos["fps"] / (length / rate)
        count = np.floor(fitting).astype(np.int64) * (length > 0)
        if windows == "first":
            count = np.minimum(count, 1)
        self.left_out = int((count == 0).sum())
        if not count.any():
            raise ValueError(
                f"None of {len(count)} videos lasts for `frames` (={frames}) at `fps` "
                f"(={fps}); the longest has {videos['frames'].max()} frames."
            )
        self._video = video = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(video)) - np.repeat(np.cumsum(count) - count, count)
        self._start = number * (length / rate)[video]
        self._audio_rate, self.beside = audio_rate, tuple(beside)
        self.index = make_index(
            len(video),
            frames=length[video],
            height=videos["height"][video] if height is None else height,
            width=videos["width"][video] if width is None else width,
            fps=rate[video],
            has_audio=(videos["has_audio"][video] & (audio_rate > 0)),
        )
        # The last: channels of the sound.
        self._settings = [frames, height, width, fps, windows, audio_rate, 2]
        self._settings += self.beside

    def _encoded(self, video: int) -> tuple[bytes, str]:
        """Returns the file and the caption of a video."""
        raise LookupError(video)

    def _beside(self, video: int) -> Mapping[str, Any]:
        """Returns what lies beside a video: the file of a guide, and of a camera."""
        return {}

    def _read_one(self, i: int) -> Clip:
        video, start = int(self._video[i]), float(self._start[i])
        data, caption = self._encoded(video)
        window = {name: self.index[name][i].item() for name in (*SIZE, "fps")}
        how = {"start_seconds": start, "audio_rate": self._audio_rate}
        clip = decode_clip(data, **window, **how) | {"caption": caption}
        if not self.beside:
            return clip
        files = self._beside(video)
        if guide := files.get("guide"):
            clip["guide"] = decode_clip(guide, **window, start_seconds=start)["video"]
        if camera := files.get("camera"):
            path = parse_camera(camera, "the camera of a record")
            clip["camera"] = path.poses(**window, start=start)
        return clip


class RecordSource(VideoWindows):
    """Videos of a record data set.

    Args:
        path: the data set directory.
        split: which split.
        **window: `frames`, `height`, `width`, `fps`, `windows` and
            `audio_rate`, as for `VideoWindows`.

    Raises:
        ValueError: the data set holds no videos, or none is long enough.
    """

    def __init__(self, path: str | Path, split: str = "train", **window: Any):
        self._records = RecordDataset(path, split)
        if self._records.features.get("video") != "bytes":
            raise ValueError(
                f"{path} holds {sorted(self._records.features)} and no encoded videos; "
                "read latents with `LatentSource`."
            )
        _check_features(self._records)
        for name in window.get("beside", ()):
            if name not in self._records.features:
                raise ValueError(_LACKS.format(path, name=name, suffix=SIDECARS[name]))
        super().__init__(self._records.index, **window)
        self.fingerprint = fingerprint(
            "records", self._records.fingerprint, *self._settings
        )

    @property
    def captioned(self) -> bool:
        """Whether any of the clips has a caption."""
        return bool(self._records.index["caption_length"].any())

    def _encoded(self, video: int) -> tuple[bytes, str]:
        record = self._records[video]
        return record["video"], record["caption"]

    def _beside(self, video: int) -> Mapping[str, Any]:
        record = self._records[video]
        return {name: record[name] for name in self.beside}


def _check_features(records: RecordDataset, *more: str) -> None:
    """Raises ValueError if a data set lacks what every source of clips needs."""
    for name in ("caption", *SIZE, "fps", "has_audio", *more):
        if name not in records.features:
            raise ValueError(
                f"the records of {records.path} have no `{name}`; they have: "
                f"{', '.join(sorted(records.features))}."
            )


@dataclasses.dataclass
class _Probes:
    """What was found in the examples of a data set, and why others are left out."""

    rows: list[tuple[int, int, int, int, float, bool]]
    rejects: list[tuple[int, str]]


class TfdsSource(VideoWindows):
    """Encoded videos of any TFDS data set that can be read at random.

    The data set is read once to learn its sizes; videos that cannot be probed are
    left out and listed in `rejects`.

    Args:
        name: name of a data set, such as "clips:1.0.0", or its directory.
        split: which split.
        data_dir: where data sets lie, if `name` is a name.
        video: feature that holds the bytes of a video file.
        caption: feature that holds the caption. None: captions are empty.
        **window: as for `RecordSource`.

    Attributes:
        rejects: (example, reason) of what was left out.

    Raises:
        ValueError: there is no such feature, or no video can be read.
    """

    def __init__(
        self,
        name: str | Path,
        split: str = "train",
        *,
        data_dir: str | Path | None = None,
        video: str = "video",
        caption: str | None = "caption",
        **window: Any,
    ):
        for each in window.get("beside", ()):
            raise ValueError(_LACKS.format(name, name=each, suffix=SIDECARS[each]))
        builder, self._examples = _opened_tfds(name, split, data_dir)
        info = builder.info.splits[split]
        identity = [builder.info.full_name, split, info.num_examples, info.num_bytes]
        self._features = (video, caption)
        names = (*SIZE, "fps", "has_audio")
        found = fingerprint(str(builder.data_dir), identity, video, caption)
        known = cache_folder() / "probes" / f"{found}.json"
        rows, self.rejects = self._probes(known, names)
        if not rows:
            raise ValueError(
                f"None of the {len(self._examples)} examples of {name} is a video; the "
                f"first: {self.rejects[:1]}."
            )
        self._kept, *columns = map(np.array, zip(*rows, strict=True))
        super().__init__(dict(zip(names, columns, strict=True)), **window)
        self.fingerprint = fingerprint(
            "tfds", identity, rows, video, caption, *self._settings
        )

    def _probes(
        self, known: Path, names: Sequence[str]
    ) -> tuple[list[tuple[Any, ...]], list[tuple[int, str]]]:
        """What is known of each video, and which aren't any; kept for the next start.

        Args:
            known: file of what was found before, if it was.
            names: of the columns after the number of the example.
        """
        with contextlib.suppress(OSError, ValueError):
            kept = read_json(known, "delete it", _Probes)
            return kept.rows, kept.rejects
        found = _Probes([], [])
        for i in range(len(self._examples)):
            try:
                video = probe(self._example(i)[0], scan=True)
                found.rows.append((i, *(getattr(video, name) for name in names)))
            except (MediaError, UnicodeDecodeError) as error:
                found.rejects.append((i, str(error)))
        with contextlib.suppress(OSError):  # a home that can't be written to
            write_json(known, dataclasses.asdict(found))
        return found.rows, found.rejects

    def _example(self, i: int) -> tuple[bytes, str]:
        example = self._examples[i]
        video, caption = self._features
        for feature in filter(None, self._features):
            if feature not in example:
                raise ValueError(
                    f"The examples have no feature {feature!r}; they have: "
                    f"{', '.join(sorted(example))}."
                )
        text = "" if caption is None else example[caption]
        text = text.decode() if isinstance(text, bytes) else str(text)
        return bytes(example[video]), text

    def _encoded(self, video: int) -> tuple[bytes, str]:
        return self._example(int(self._kept[video]))


def _opened_tfds(name: str | Path, split: str, data_dir: Any) -> tuple[Any, Any]:
    """Opens a TFDS data set: its builder, and the examples of a split."""
    try:
        path = local_path(name)
        if path.is_dir():
            builder: Any = tfds.builder_from_directory(path)
        else:
            place = None if data_dir is None else local_path(data_dir)
            builder = tfds.builder(str(name), data_dir=place)
        return builder, builder.as_data_source(split=split)
    except Exception as error:  # of protobuf, of TFDS, of what it imports
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"TFDS can't open {name}, split {split!r} ({told}); give the name or the "
            "folder of a data set that was prepared as array_record."
        ) from error


class LatentSource(Indexed):
    """Latents (and text states) of a record data set.

    Args:
        path: the data set directory.
        split: which split.
        max_text: most text tokens kept for a caption that has no stored states.
        pad_text: every caption has room for `max_text` tokens.
        frames: take at most the first so many pixel frames of each clip, which a causal
            autoencoder codes without looking at the others. None: all.

    Attributes:
        path: the data set directory.
        settings: what made the latents: the VAE, its normalisation and so on.
        views: names of `VIEWS` that were encoded beside the clips.
        view: the one that is read with them; "": none.

    Raises:
        ValueError: the data set holds no latents, or none of so many frames.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        max_text: int = 512,
        pad_text: bool = False,
        frames: int | None = None,
    ):
        self._records = RecordDataset(path, split)
        features, index = self._records.features, self._records.index
        if "mean" not in features:
            raise ValueError(
                f"{path} holds {sorted(features)} and no latents; encode it first, or "
                "read its videos with `RecordSource`."
            )
        _check_features(self._records, "text_length")
        self.path, self.settings = self._records.path, self._records.settings
        self.views, self.view = tuple(x for x in VIEWS if x in features), ""
        text = index["text_length"]
        if not text.all():
            # No tokenizer makes more tokens of a caption than it has characters, but
            # for what its vocabulary lacks; that is cut off.
            bound = np.minimum(index["caption_length"] + 2, max_text)
            text = np.where(text > 0, text, bound)
        if pad_text:
            text = np.full_like(text, max_text)
        taken = {name: index[name] for name in (*SIZE, "fps", "has_audio")}
        taken["sounds"] = index.get("sounds", 0)
        if frames is not None:
            most = _latent_frames(frames, self.temporal_compression)
            taken["frames"] = np.minimum(taken["frames"], most)
            taken["sounds"] = self._sounds(frames, taken)
        self.index = make_index(len(self._records), text_length=text, **taken)
        options = ("padded",) * pad_text + (f"frames {frames}",) * (frames is not None)
        self.fingerprint = fingerprint(
            "latents", self._records.fingerprint, max_text, *options
        )

    @property
    def temporal_compression(self) -> int:
        """Pixel frames of a latent frame after the first."""
        fields = self.settings["vae"]["fields"]
        return 2 ** sum(map(bool, fields["temporal_downsample"]))

    def captions(self, ids: Ids) -> list[str]:
        """Returns the captions of clips; see `RecordDataset.captions`."""
        return self._records.captions(ids)

    def has(self, view: str) -> np.ndarray:
        """Which clips have a view that some may lack, a row of `PRESENCE`."""
        return np.asarray(self._records.index[PRESENCE[view]], bool)

    def _read_one(self, i: int) -> Clip | BadClip:
        record = self._records[i]
        size = tuple(int(self._records.index[name][i]) for name in SIZE)
        if record["mean"].shape[:3] != size:
            return BadClip(f"latents of {record['mean'].shape}, indexed as {size}")
        clip = {name: record[name] for name in ("caption", "fps", "has_audio")}
        frames, sounds = (int(self.index[name][i]) for name in ("frames", "sounds"))
        lengths = {"mean": frames, "logvar": frames, "text_embeds": None}
        if sounds:
            lengths |= {"sound_mean": sounds, "sound_logvar": sounds}
        for name, most in lengths.items():
            if name in record:
                clip[name] = np.asarray(record[name][:most], np.float32)
        if self.view:
            size = frames, *size[1:]
            found = VIEWS[self.view].size(size, self.temporal_compression)
            most = found[0] if found else 0
            clip["view"] = np.asarray(record[self.view][:most], np.float32)
        return clip

    def _sounds(self, frames: int, index: Mapping[str, Any]) -> Any:
        """How many latents of each sound belong to the first frames; pictures: none."""
        if frames == 1 or "audio_vae" not in self.settings:
            return 0
        fields = self.settings["audio_vae"]["fields"]
        hop = fields["patch_size"] * math.prod(fields["strides"])
        held = np.ceil(frames / index["fps"] * fields["sample_rate"] / hop)
        return np.minimum(index["sounds"], held.astype(np.int64))


def _latent_frames(frames: int, each: int) -> int:
    """How many latent frames, of `each` pixel frames, hold the first `frames`."""
    whole, rest = divmod(frames - 1, each)
    if frames < 1 or rest:
        near = 1 + max(whole, 0) * each
        raise ValueError(
            f"`frames` (={frames}) of latents must be 1 more than a multiple of {each};"
            f" try {near} or {near + each}."
        )
    return 1 + whole


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
    path = path.removeprefix("tfds:") if foreign else _prepared(path)
    if foreign or "mean" not in RecordDataset(path, split).features:
        if match[6]:
            raise ValueError(f"source {name!r} holds no latents; give FRAMESxHxW@FPS.")
        return (TfdsSource if foreign else RecordSource)(path, split, **options)
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


def _prepared(path: str) -> str:
    """Returns the folder of a data set, unless it is one of videos."""
    folder = local_path(path)
    if not (dataset_directory(folder) / "manifest.json").exists():
        if holds_videos(folder):
            raise ValueError(
                f"{folder} holds videos, and no data set of clips; run "
                f"`python tools/prepare_clips.py {folder} --out CLIPS …` first, and "
                "give CLIPS."
            )
    return str(folder)


def origin(name: str) -> str:
    """The name of the source that a source's latents were encoded from, else its own.

    Args:
        name: the name of a source that can be opened.
    """
    if _is_world(name) or name.startswith("tfds:"):
        return name
    split = _divided(name)[1].partition(":")[0] or "train"
    settings = RecordDataset(source_folder(name), split).settings
    return settings.get("origins", {}).get(split, name)


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
