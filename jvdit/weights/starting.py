"""Initial weights of a training, from another run or from a released model."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jvdit.machine.json_files import differences
from jvdit.sharding import parameter_shardings
from jvdit.weights.bundle import Bundle
from jvdit.weights.fitting import fitted, other_parts
from jvdit.weights.folders import load_dit
from jvdit.weights.parameters import load_weights, weights_hash
from jvdit.weights.release import is_release, read_release

# (network, paths) to the initial parameters at these paths.
Fresh = Callable[[str, Sequence[str]], Mapping[str, Any]]

_BEGINNING = 1 << 20  # bytes that are hashed of a file: header and first weights


def finished_parameters(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, Any],
    mesh: Mesh,
    expert: str = "dit",
    fresh: Fresh | None = None,
) -> dict[str, Any]:
    """Reads the parameters that a training starts from, sharded over the mesh.

    Args:
        folder: the `model` folder of another run, that of the only network that is
            wanted, or a released model.
        wanted: shapes and dtypes of the parameters to read, by network.
        mesh: the device mesh.
        expert: the expert of a released model to read as "dit", "dit" or "dit_low";
            "both": read each as itself.
        fresh: makes the initial parameters of a network at some paths, for the sound or
            the long skips of one that starts from one without.

    Raises:
        FileNotFoundError: a network is missing in the folder.
        ValueError: its parameters have other names or shapes.
    """
    if not is_release(folder):
        return _own_parameters(folder, wanted, mesh, fresh)
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
        scan = "blocks" in shapes
        held = load_dit(parts[name], mesh, dtype, scan_layers=scan).params
        params[name] = _fitted(held, name, wanted, fresh)
        other = f"{parts[name]} is another network than this config's"
        remedy = "take the sizes of its row of `dit.VARIANTS`"
        _check_alike(params[name], shapes, other, remedy)
    return params


def _own_parameters(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, Any],
    mesh: Mesh,
    fresh: Fresh | None,
) -> dict[str, Any]:
    """Reads the parameters of another run; each device gets its shard of the files."""
    whole = pathlib.Path(folder)
    # A folder may hold a network itself, as that of the sounds does in the box.
    alone = len(wanted) == 1 and (whole / "weights.safetensors").exists()
    places = {name: whole if alone else whole / name for name in wanted}
    if "dit_low" in wanted and not (whole / "dit_low").exists():
        places["dit_low"] = places["dit"]  # both experts begin as the one network
    params = {name: load_weights(place)[0] for name, place in places.items()}
    params = {name: _fitted(x, name, wanted, fresh) for name, x in params.items()}
    other = f"{folder} holds other networks than this config's"
    remedy = "change `start_from` or the sizes of the networks"
    _check_alike(params, dict(wanted), other, remedy)
    shardings = parameter_shardings(params, mesh)
    return jax.tree.map(_divided, params, shardings, dict(wanted))


def _fitted(
    held: Any, name: str, wanted: Mapping[str, Any], fresh: Fresh | None
) -> Any:
    """Parameters of a network, with the parts that it has, and no others."""
    if fresh is None or not other_parts(held, wanted[name]):
        return held
    return fitted(held, wanted[name], partial(fresh, name))


def _check_alike(held: Any, asked: Any, other: str, remedy: str) -> None:
    """Raises a ValueError if two trees of parameters differ in paths or shapes."""
    shapes = (
        {jax.tree_util.keystr(k): x.shape for k, x in jax.tree.leaves_with_path(tree)}
        for tree in (held, asked)
    )
    if differing := differences(*shapes):
        count = f"{len(differing)} parameters differ in all"
        raise ValueError(f"{other}: {differing[0]} ({count}); {remedy}.")


def _divided(value: np.ndarray, place: NamedSharding, like: Any) -> jax.Array:
    """Shards an array over the mesh, in the wanted dtype; files may hold fewer bits."""
    return jax.make_array_from_callback(
        value.shape, place, lambda part: value[part].astype(like.dtype)
    )


def fingerprint(folder: str | os.PathLike[str], expert: str = "dit") -> str:
    """A quick digest of weights, from the sizes and first megabytes of their files.

    Args:
        folder: the `model` folder of another run, or a released model.
        expert: the part of a released model, such as "dit" or "dit_low".
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
    """A digest of all weights of a model, quick for those of a released model.

    Networks read from a release count by the `fingerprint` of their files.
    """

    def known(model: Bundle) -> dict[str, Any]:
        release = model.text_release
        return {
            name: np.frombuffer(fingerprint(release, name).encode(), np.uint8)
            if callable(network.source)
            else network.source
            for name, network in model.networks.items()
        }

    return weights_hash([known(x) for x in (model, model.pictures) if x is not None])
