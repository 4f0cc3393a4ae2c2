"""Saves and loads finished weights: a safetensors file, and the module's fields.

Each folder is self-contained, and a digest in it tells whether the weights have changed
since they were written.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jvdit.machine.files import replacing
from jvdit.machine.json_files import read_json, write_json

_DIGEST = "digest"  # key of the weights' digest in the metadata of their file
PathLike = str | os.PathLike[str]


def module_fields(module: Any) -> dict[str, Any]:
    """The fields of a Linen module as JSON values."""
    return {
        field.name: json_field(field.name, getattr(module, field.name))
        for field in dataclasses.fields(module)
        if field.name not in ("parent", "name")
    }


def json_field(name: str, value: Any) -> Any:
    """A module's field as a JSON value: dtypes by name, tuples as lists."""
    if name.endswith("dtype"):
        return jnp.dtype(value).name
    return list(value) if isinstance(value, tuple) else value


def build(module: type, fields: dict[str, Any]) -> Any:
    """Builds a Linen module from its fields; lists, as JSON has them, become tuples."""
    return module(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )


def model_folder(folder: PathLike) -> pathlib.Path:
    """The `model` folder of a workdir, or the folder itself if it has none."""
    folder = pathlib.Path(folder)
    return folder / "model" if (folder / "model").is_dir() else folder


def save_weights(folder: PathLike, params: Any, config: Mapping[str, Any]) -> None:
    """Writes `weights.safetensors` and `config.json`.

    Args:
        folder: created if needed; each file is replaced atomically.
        params: a nested dict of arrays.
        config: JSON values that `load_weights` returns beside them.
    """
    folder = pathlib.Path(folder)
    flat = flatten_dict(params, sep="/")
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    with replacing(folder / "weights.safetensors") as scratch:
        save_file(flat, scratch, metadata={_DIGEST: weights_hash(params)})
    write_json(folder / "config.json", config)


def load_weights(folder: PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `save_weights` wrote: (params, config).

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the weights can't be read, for example because they were cut off,
            or they have changed since they were written.
    """
    weights, config = weights_files(folder)
    try:
        with safe_open(weights, "numpy") as opened:
            metadata = opened.metadata() or {}
        params = unflatten_dict(load_file(weights), sep="/")
    except Exception as error:
        raise ValueError(f"{weights} can't be read ({error}); copy it anew.") from error
    check_weights(weights, params, metadata)
    return params, read_json(config, "copy it anew", dict[str, Any])


def weights_files(folder: PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """The paths of the weights and the config that `save_weights` wrote to a folder.

    Raises:
        FileNotFoundError: there is no model in the folder.
    """
    folder = pathlib.Path(folder)
    weights, config = folder / "weights.safetensors", folder / "config.json"
    if not weights.exists() or not config.exists():
        raise FileNotFoundError(
            f"{folder} holds no model (weights.safetensors and config.json); give the "
            "`model` folder of a workdir that has saved a checkpoint."
        )
    return weights, config


def check_weights(file: pathlib.Path, params: Any, metadata: Mapping[str, str]) -> None:
    """Checks that weights haven't changed since `save_weights` wrote them.

    Args:
        file: the safetensors file, for the error message.
        params: the weights read from it.
        metadata: the file's metadata. Without a digest, as in a file written by another
            program, nothing is compared.

    Raises:
        ValueError: the weights have changed.
    """
    if metadata.get(_DIGEST, held := weights_hash(params)) != held:
        raise ValueError(
            f"{file} has changed since it was written (its digest is {held}, not "
            f"{metadata[_DIGEST]}): copy it anew. If the change was meant, write the "
            "weights with `save_weights`, or without the metadata of the old file."
        )


def weights_hash(params: Any) -> str:
    """A digest of the names, shapes, dtypes and values of weights: 16 hex digits.

    Raises:
        TypeError: a leaf isn't an array; its digest would differ from run to run.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(leaf)
        if value.dtype == object:
            raise TypeError(f"{jax.tree_util.keystr(path)} is no array but {leaf!r}.")
        digest.update(
            f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode()
        )
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]
