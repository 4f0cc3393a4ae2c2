"""What a record data set is made of: its features, its places, its files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from jvdit.machine.files import local_path

FORMAT = "jvdit-records-1"
SCALARS = {"int64": np.int64, "float32": np.float32, "bool": np.bool_}

CLIP_FEATURES: dict[str, str] = {
    "key": "text",
    "video": "bytes",  # an mp4 file: H.264, and AAC if has_audio
    "caption": "text",
    "meta": "text",  # JSON: where the clip came from and what was done to it
    "frames": "int64",
    "height": "int64",  # pixels
    "width": "int64",  # pixels
    "fps": "float32",
    "has_audio": "bool",
}


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
    features = {"key": "text", "mean": f"{dtype}[f h w c]"}
    if logvar:
        features["logvar"] = f"{dtype}[f h w c]"
    if text:
        features["text_embeds"] = f"{dtype}[s e]"
    scalars = dict.fromkeys(("frames", "height", "width", "text_length"), "int64")
    return features | {
        "caption": "text",
        "meta": "text",
        **scalars,
        "fps": "float32",
        "has_audio": "bool",
    }


def tensor_spec(kind: str) -> tuple[np.dtype, int]:
    """Returns the (dtype, rank) of a feature such as "bfloat16[f h w c]"."""
    match = re.fullmatch(r"(\w+)\[([\w ]*)\]", kind)
    if match is None:
        known = ["text", "bytes", *SCALARS, "<dtype>[axes], e.g. bfloat16[f h w c]"]
        raise ValueError(f"Unknown feature kind {kind!r}; known: {', '.join(known)}.")
    dtype = getattr(ml_dtypes, match[1], match[1])
    return np.dtype(dtype), len(match[2].split())


def tfds_features(features: Mapping[str, str]) -> tfds.features.FeaturesDict:
    """Translates a table of features into what TFDS calls by that name."""
    out: dict[str, Any] = {}
    for name, kind in features.items():
        if kind == "text":
            out[name] = tfds.features.Text()
        elif kind == "bytes":
            out[name] = tfds.features.Tensor(shape=(), dtype=np.object_)
        elif kind in SCALARS:
            out[name] = tfds.features.Scalar(SCALARS[kind])
        else:
            dtype, rank = tensor_spec(kind)
            out[name] = tfds.features.Tensor(
                shape=(None,) * rank, dtype=dtype.type, encoding="bytes"
            )
    return tfds.features.FeaturesDict(out)


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
    newest = max(versions, key=lambda v: [int(x) for x in v.split(".")], default=None)
    return root / (newest or "1.0.0")


def difference(old: Any, new: Any) -> str:
    """Says in a few words where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in old | new if old.get(k) != new.get(k)]
        return ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys[:4])
    return f"{old!r} -> {new!r}"


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns a data set's manifest, or says why there is none."""
    file = path / "manifest.json"
    if not file.exists():
        if (path / "_work").exists():
            done = len(list(path.glob("[!.]*.array_record-*")))
            raise ValueError(
                f"{path} is an unfinished data set ({done} shards done); run the "
                "command that began it again to finish it."
            )
        what = "no data set" if path.exists() else "no such directory"
        raise FileNotFoundError(f"{path}: {what} (manifest.json is missing).")
    manifest = json.loads(file.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} is of format {manifest.get('format')!r}; this reads {FORMAT!r}."
        )
    return manifest
