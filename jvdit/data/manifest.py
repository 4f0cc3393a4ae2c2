"""Where a data set lies, and its manifest: features, settings, shards, digests."""

import re
from pathlib import Path
from typing import Any

import msgspec

from jvdit.machine import files
from jvdit.machine.json_files import read_json

FORMAT = "jvdit-records-1"
COPY_AGAIN = "copy the data set again"


def is_version(name: str) -> bool:
    """Whether a directory name is a TFDS version, e.g. 1.0.0."""
    return re.fullmatch(r"\d+\.\d+\.\d+", name) is not None


def dataset_directory(path: str | Path) -> Path:
    """Returns the directory that holds the shards of the data set at `path`.

    `path` names either `<name>/<version>` or `<name>`: then the newest version in
    it, or 1.0.0 if there is none yet.
    """
    root = files.local_path(path)
    if is_version(root.name) or (root / "manifest.json").exists():
        return root
    found = [x.name for x in root.glob("*.*.*") if is_version(x.name)]
    return root / max(found, key=lambda v: [*map(int, v.split("."))], default="1.0.0")


class Shard(msgspec.Struct, omit_defaults=True):
    """A shard of records that is complete.

    Attributes:
        file: its name.
        file_bytes, bytes: length of the file, and of all of its records.
        records: number of records.
        digest: hash of the records.
        rows: their rows of the index; only until the data set is finished.
    """

    file: str
    file_bytes: int
    records: int
    bytes: int
    digest: str
    rows: list[dict[str, Any]] = []


class MadeOf(msgspec.Struct):
    """What a data set was begun with; see `RecordWriter`."""

    features: dict[str, str]
    shards: dict[str, int]
    settings: dict[str, Any]


class Manifest(msgspec.Struct):
    """What a finished data set holds: its shards by split."""

    format: str
    name: str
    plan: MadeOf
    splits: dict[str, list[Shard]]


def read_manifest(path: Path) -> Manifest:
    """Returns a data set's manifest, or says why there is none."""
    file = path / "manifest.json"
    if file.exists():
        manifest = read_json(file, COPY_AGAIN, Manifest)
        if manifest.format == FORMAT:
            return manifest
        raise ValueError(
            f"{file} is of format {manifest.format!r}; this reads {FORMAT!r}."
        )
    if (path / "_work").exists():
        done = len(list(path.glob("[!.]*.array_record-*")))
        raise ValueError(
            f"{path} is an unfinished data set ({done} shards done); run the "
            "command that began it again to finish it."
        )
    what = "no data set" if path.exists() else "no such directory"
    raise FileNotFoundError(f"{path}: {what} (manifest.json is missing).")
