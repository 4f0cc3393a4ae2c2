"""The features of a data set: what each record holds, and the columns of the index."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds

from jvdit.data.conditions.beside import PRESENCE, VIEWS

SCALARS = {"int64": np.int64, "float32": np.float32, "bool": np.bool_}


def _features(first: dict[str, str], *counts: str) -> dict[str, str]:
    """Adds what every data set has to its first features, and further counts."""
    described = {"caption": "text", "meta": "text"}  # meta: JSON, how it was made
    described |= dict.fromkeys(("frames", "height", "width", *counts), "int64")
    return {"key": "text"} | first | described | {"fps": "float32", "has_audio": "bool"}


# `video` is an mp4 file: H.264, and AAC if has_audio; height and width are pixels.
CLIP_FEATURES = _features({"video": "bytes"})


def clip_features(beside: Sequence[str] = ()) -> dict[str, str]:
    """Returns the features of a data set of clips.

    Args:
        beside: what some of the clips have besides: "guide", an mp4 file, and "camera",
            the text of a camera path; each with a flag that says whether.
    """
    kinds = {"guide": "bytes", "camera": "text"}
    more = {name: kinds[name] for name in beside}
    return CLIP_FEATURES | more | {f"has_{name}": "bool" for name in beside}


def latent_features(
    dtype: str = "bfloat16",
    *,
    logvar: bool = True,
    text: bool = True,
    sound: bool = False,
    views: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the features of a data set of latents.

    Args:
        dtype: how the tensors are stored: "bfloat16", "float16" or "float32".
        logvar: whether the posterior's log variance is kept beside its mean.
        text: whether text encoder states, trimmed to their length, are stored.
        sound: whether latents of the sound are stored.
        views: names of `VIEWS`, of which the means are stored, or what is measured.

    Returns:
        Features of `mean` (and `logvar`) and of views [f h w c], `text_embeds` [s e],
        `sound_mean` (and `sound_logvar`) [n c], the caption and the scalars; `frames`,
        `height` and `width` count latents, `text_length` the text tokens (0 without
        `text_embeds`), `sounds` the latents of the sound (0 for a silent clip). Of
        views that some clips may lack, `has_guide` and the like say which have them.
    """
    names: list[str] = ["mean", "logvar"] if logvar else ["mean"]
    tensors = dict.fromkeys([*names, *views], f"{dtype}[f h w c]")
    for name in views:  # numbers that a network is to read exactly
        if VIEWS[name].measured:
            tensors[name] = "float32[f h w c]"
    tensors |= {PRESENCE[name]: "bool" for name in views if name in PRESENCE}
    if text:
        tensors["text_embeds"] = f"{dtype}[s e]"
    if sound:
        tensors |= {f"sound_{name}": f"{dtype}[n c]" for name in names}
    return _features(tensors, "text_length", *["sounds"] * sound)


def tfds_features(features: Mapping[str, str]) -> tfds.features.FeaturesDict:
    """Translates a table of features into what TFDS calls by that name."""

    def feature(kind: str) -> Any:
        if kind == "text":
            return tfds.features.Text()
        if kind == "bytes":
            return tfds.features.Tensor(shape=(), dtype=np.object_)
        if kind in SCALARS:
            return tfds.features.Scalar(SCALARS[kind])
        match = re.fullmatch(r"(\w+)\[([\w ]*)\]", kind)
        if match is None:
            known = ["text", "bytes", *SCALARS, "<dtype>[axes], e.g. bfloat16[f h w c]"]
            raise ValueError(
                f"Unknown feature kind {kind!r}; known: {', '.join(known)}."
            )
        try:
            dtype = np.dtype(getattr(ml_dtypes, match[1], match[1])).type
        except TypeError as error:
            raise ValueError(f"Unknown feature kind {kind!r}: {error}.") from None
        shape = (None,) * len(match[2].split())
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict({k: feature(x) for k, x in features.items()})


def index_schema(features: Mapping[str, str]) -> pa.Schema:
    """The columns of the index of a data set, see `RecordDataset.index`."""
    first = [("split", pa.string()), ("shard", pa.int64()), ("record", pa.int64())]
    scalars = [
        (name, pa.from_numpy_dtype(SCALARS[kind]))
        for name, kind in features.items()
        if kind in SCALARS
    ]
    last = [("caption_length", pa.int64()), ("caption", pa.string())]
    last *= "caption" in features
    return pa.schema([*first, ("key", pa.string()), *scalars, *last])
