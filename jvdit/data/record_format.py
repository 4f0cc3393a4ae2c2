"""What a record data set is made of: its features, its places, its files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import tensorflow_datasets as tfds

from jvdit.machine.files import local_path
from jvdit.machine.json_files import read_json

FORMAT = "jvdit-records-1"
COPY_AGAIN = "copy the data set again"
SCALARS = {"int64": np.int64, "float32": np.float32, "bool": np.bool_}


def _features(first: dict[str, str], *counts: str) -> dict[str, str]:
    """Adds what every data set has to its first features, and further counts."""
    described = {"caption": "text", "meta": "text"}  # meta: JSON, how it was made
    described |= dict.fromkeys(("frames", "height", "width", *counts), "int64")
    return {"key": "text"} | first | described | {"fps": "float32", "has_audio": "bool"}


# `video` is an mp4 file: H.264, and AAC if has_audio; height and width are pixels.
CLIP_FEATURES = _features({"video": "bytes"})


def latent_features(
    dtype: str = "bfloat16", *, logvar: bool = True, text: bool = True
) -> dict[str, str]:
    """Returns the features of a data set of video latents.

    Args:
        dtype: how the tensors are stored: "bfloat16", "float16" or "float32".
        logvar: whether the posterior's log variance is kept beside its mean.
        text: whether text encoder states, trimmed to their length, are stored.

    Returns:
        Features of `mean` (and `logvar`) [f h w c], `text_embeds` [s e], the caption
        and the scalars; `frames`, `height` and `width` count latents, `text_length` the
        text tokens (0 without `text_embeds`).
    """
    names: list[str] = ["mean", "logvar"] if logvar else ["mean"]
    tensors = dict.fromkeys(names, f"{dtype}[f h w c]")
    if text:
        tensors["text_embeds"] = f"{dtype}[s e]"
    return _features(tensors, "text_length")


def tensor_spec(kind: str) -> tuple[np.dtype, int]:
    """Returns the (dtype, rank) of a feature such as "bfloat16[f h w c]"."""
    match = re.fullmatch(r"(\w+)\[([\w ]*)\]", kind)
    if match is None:
        known = ["text", "bytes", *SCALARS, "<dtype>[axes], e.g. bfloat16[f h w c]"]
        raise ValueError(f"Unknown feature kind {kind!r}; known: {', '.join(known)}.")
    return np.dtype(getattr(ml_dtypes, match[1], match[1])), len(match[2].split())


def tfds_features(features: Mapping[str, str]) -> tfds.features.FeaturesDict:
    """Translates a table of features into what TFDS calls by that name."""

    def feature(kind: str) -> Any:
        if kind == "text":
            return tfds.features.Text()
        if kind == "bytes":
            return tfds.features.Tensor(shape=(), dtype=np.object_)
        if kind in SCALARS:
            return tfds.features.Scalar(SCALARS[kind])
        dtype, rank = tensor_spec(kind)
        shape = (None,) * rank
        return tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")

    return tfds.features.FeaturesDict(
        {n: feature(kind) for n, kind in features.items()}
    )


def is_version(name: str) -> bool:
    """Whether a directory name is a TFDS version, e.g. 1.0.0."""
    return re.fullmatch(r"\d+\.\d+\.\d+", name) is not None


def dataset_directory(path: str | Path) -> Path:
    """Returns the directory that holds the shards of the data set at `path`.

    `path` names either `<name>/<version>` or `<name>`: then the newest version in
    it, or 1.0.0 if there is none yet.
    """
    root = local_path(path)
    if is_version(root.name) or (root / "manifest.json").exists():
        return root
    versions = [d.name for d in root.glob("*.*.*") if is_version(d.name)]
    return root / max(
        versions, key=lambda v: [int(x) for x in v.split(".")], default="1.0.0"
    )


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
