"""Encoded videos of data sets that TFDS reads."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jvdit.data.clips import SIZE
from jvdit.data.media.media_error import MediaError
from jvdit.data.media.reader import probe
from jvdit.data.order import fingerprint
from jvdit.data.video_sources import LACKS, SIDECARS, VideoWindows
from jvdit.machine.files import cache_folder, local_path
from jvdit.machine.json_files import read_json, write_json

_COLUMNS = (*SIZE, "fps", "has_audio")  # of what is probed


@dataclasses.dataclass
class _Probes:
    """Number and columns of each video of a data set, and why others are left out."""

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
            raise ValueError(LACKS.format(name, name=each, suffix=SIDECARS[each]))
        builder, self._examples = _opened_tfds(name, split, data_dir)
        info = builder.info.splits[split]
        identity = [builder.info.full_name, split, info.num_examples, info.num_bytes]
        self._features = (video, caption)
        found = fingerprint(str(builder.data_dir), identity, video, caption)
        probes = self._probes(cache_folder() / "probes" / f"{found}.json")
        rows, self.rejects = probes.rows, probes.rejects
        if not rows:
            raise ValueError(
                f"None of the {len(self._examples)} examples of {name} is a video; the "
                f"first: {self.rejects[:1]}."
            )
        self._kept, *columns = map(np.array, zip(*rows, strict=True))
        super().__init__(dict(zip(_COLUMNS, columns, strict=True)), **window)
        self.fingerprint = fingerprint(
            "tfds", identity, rows, video, caption, *self._settings
        )

    def _probes(self, known: Path) -> _Probes:
        """What is known of the videos; kept in a file for the next start."""
        with contextlib.suppress(OSError, ValueError):
            return read_json(known, "delete it", _Probes)
        found = _Probes([], [])
        for i in range(len(self._examples)):
            try:
                video = probe(self._example(i)["video"], scan=True)
                found.rows.append((i, *(getattr(video, x) for x in _COLUMNS)))
            except (MediaError, UnicodeDecodeError) as error:
                found.rejects.append((i, str(error)))
        with contextlib.suppress(OSError):  # a home that can't be written to
            write_json(known, dataclasses.asdict(found))
        return found

    def _example(self, i: int) -> dict[str, Any]:
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
        return {"video": bytes(example[video]), "caption": text}

    def _record(self, video: int) -> dict[str, Any]:
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
