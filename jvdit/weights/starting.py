"""Finished networks, of our own runs or released, to begin a training with."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from jvdit.machine.json_files import differences
from jvdit.sharding import parameter_shardings
from jvdit.weights.bundle import Bundle
from jvdit.weights.folders import load_dit
from jvdit.weights.parameters import check_weights, weights_files, weights_hash
from jvdit.weights.release import is_release, read_release
from jvdit.weights.tensors import TensorFiles

_BEGINNING = 1 << 20  # bytes of a file: its header, and the first weights


def finished_parameters(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, Any],
    mesh: Mesh,
    expert: str = "dit",
) -> dict[str, Any]:
    """Reads parameters of finished networks.

    Args:
        folder: the `model` folder of another run, or a released model.
        wanted: shapes of the parameters of each network. Those of a released model take
            the types from here too.
        mesh: on which they are divided.
        expert: which of a released model's networks "dit" is; "both": itself.

    Raises:
        FileNotFoundError: a network is missing there.
        ValueError: its parameters have other names or shapes.
    """
    if not is_release(folder):
        return _own_parameters(folder, wanted, mesh)
    parts = dict(read_release(folder).parts)
    if expert not in (*parts, "both"):
        raise ValueError(f"`expert` (={expert!r}) is none of {folder}: {[*parts]}.")
    if expert != "both":
        parts = {"dit": parts[expert]}
    if unknown := set(wanted) - set(parts):
        raise ValueError(
            f"a released model ({folder}) starts its {' and '.join(parts)} alone, and "
            f"this run trains {' and '.join(sorted(unknown))} too: train a DiT, on the "
            "text states of its encoder (`config.text_encoder` empty)."
        )
    params = {}
    for name, shapes in wanted.items():
        dtype = jax.tree.leaves(shapes)[0].dtype
        loaded = load_dit(parts[name], mesh, dtype, scan_layers="blocks" in shapes)
        params[name] = loaded.params
        held, asked = (
            {jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(t)}
            for t in (params[name], shapes)
        )
        if differing := differences(held, asked):
            raise ValueError(
                f"{parts[name]} is another network than this config's: {differing[0]} "
                f"({len(differing)} parameters differ in all); take the sizes of its "
                "row of `dit.VARIANTS`."
            )
    return params


def _own_parameters(
    folder: str | os.PathLike[str], wanted: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
    """Parameters of another run, each device being given its part of the files."""
    params = {}
    for name in wanted:
        file, _ = weights_files(pathlib.Path(folder) / name)
        tensors = TensorFiles(file)
        params[name] = unflatten_dict(dict(tensors), sep="/")
        check_weights(file, params[name], tensors.metadata)
    held, asked = (
        {jax.tree_util.keystr(k): v.shape for k, v in jax.tree.leaves_with_path(tree)}
        for tree in (params, dict(wanted))
    )
    differing = differences(held, asked)
    if differing:
        raise ValueError(
            f"{folder} holds other networks than this config's: {differing[0]}"
            f" ({len(differing)} parameters differ in all); change `start_from` or the "
            "sizes of the networks."
        )
    places = parameter_shardings(params, mesh)
    return jax.tree.map(_divided, params, places, dict(wanted))


def _divided(value: np.ndarray, place: NamedSharding, like: Any) -> jax.Array:
    """An array on the mesh, in the type that is wanted: a file may have fewer bits."""
    return jax.make_array_from_callback(
        value.shape, place, lambda part: value[part].astype(like.dtype)
    )


def fingerprint(folder: str | os.PathLike[str], expert: str = "dit") -> str:
    """Tells finished networks from others, by the sizes and beginnings of their files.

    Args:
        folder: see `finished_parameters`.
        expert: which of a released model's parts; see `Release`.
    """
    place = pathlib.Path(folder)
    if is_release(folder):
        place = read_release(folder).parts[expert]
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
        digest.update(f"{file.relative_to(place)} {file.stat().st_size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_BEGINNING))
    return digest.hexdigest()[:16]


def model_hash(model: Bundle) -> str:
    """A digest of all weights of a model: `weights_hash`, without reading releases."""

    def known(model: Bundle) -> dict[str, Any]:
        release = model.text_release
        return {
            name: np.frombuffer(fingerprint(release, name).encode(), np.uint8)
            if callable(network.source)
            else network.source
            for name, network in model.networks.items()
        }

    return weights_hash([known(x) for x in (model, model.pictures) if x is not None])
