"""Any finished model as a `Bundle`: our own folder or a release, by one call."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models.lora import check, scaled, stacked
from jvdit.sharding import make_mesh, platform
from jvdit.weights.adapters import read_lora
from jvdit.weights.bundle import Bundle
from jvdit.weights.caption_encoder import release_tokenizer
from jvdit.weights.configs import PATCH_SIZE, conditions_of, patch_channels
from jvdit.weights.folders import (
    load_dit,
    load_image_encoder,
    load_text_encoder,
    load_vae,
)
from jvdit.weights.model_folder import read_bundle
from jvdit.weights.network import Network
from jvdit.weights.parameters import module_fields
from jvdit.weights.recipes import RECIPES, TEXT_LENGTH
from jvdit.weights.release import Release, is_release, read_release
from jvdit.weights.wan import LAYOUTS, dit_rules

EXPERTS = ("dit", "dit_low")


def open_bundle(
    folder: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike | None = None,
    shift: float | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    **fields: Any,
) -> Bundle:
    """Opens a model folder of ours, or a released model of the Wan 2 family.

    A release samples as its folder and its authors say; what its scheduler asks for and
    we do otherwise is logged, a line each. Its networks are read from the files when
    they are asked for.

    Args:
        folder: a workdir or its `model` folder; a pipeline as diffusers saves it, or
            the original release with its files turned to safetensors.
        mesh: for whose devices a release is read; default: all of them on `data`.
        dtype: of a release's parameters and computation; its autoencoder's are float32.
            Default: bfloat16.
        shift: timestep shift of a release; None: that of the folder's scheduler, or its
            authors' where it has none.
        parts: folders of networks in the place of a release's own, by name: "dit" and
            "dit_low" of a finetuning.
        **fields: of `DiT` that a release doesn't decide, such as `scan_layers`.

    Raises:
        FileNotFoundError: there is no model, or a part is missing; says which.
        ValueError: the folder holds another model, or damaged files; or what goes with
            releases alone was given for a model of our own.
    """
    if is_release(folder):
        mesh = make_mesh() if mesh is None else mesh
        types = jnp.bfloat16 if dtype is None else dtype
        return _released(read_release(folder), mesh, types, shift, parts or {}, fields)
    options = {"dtype": dtype, "shift": shift, "parts": parts, **fields}
    if given := [name for name, value in options.items() if value]:
        raise ValueError(
            f"{' and '.join(given)} go with a released model, and {folder} is none."
        )
    return read_bundle(folder)


def _released(
    release: Release,
    mesh: Mesh,
    dtype: DTypeLike,
    shift: float | None,
    parts: Mapping[str, str | os.PathLike[str]],
    fields: Mapping[str, Any],
) -> Bundle:
    networks = _networks(release, parts, mesh, dtype, fields)
    dit = networks["dit"].module
    recipe, scheduler = release.recipe(module_fields(dit)), release.scheduler
    _tell(release, recipe, shift)
    return Bundle(
        networks=networks,
        tokenizer=release_tokenizer(release.tokenizer),
        path=NoisePath(timesteps=scheduler.timesteps),
        policy=TimestepPolicy(
            **scheduler.policy(recipe["shift"] if shift is None else shift)
        ),
        patch_size=PATCH_SIZE,
        text_length=TEXT_LENGTH,
        conditions=conditions_of(dit, release.clean_frames),
        seconds=False,
        pad_text=True,
        boundary=recipe["boundary"],
        defaults=recipe,
        text_release=str(release.folder.absolute()),
    )


def _tell(release: Release, recipe: Mapping[str, Any], shift: float | None) -> None:
    """Logs what of a scheduler isn't followed, or isn't what the authors advise."""
    for note in release.scheduler.notes:
        logging.warning("%s: %s", release.folder, note)
    advised = RECIPES.get(recipe.get("release", ""), recipe)["shift"]
    if shift is None and advised != recipe["shift"]:
        logging.warning(
            "%s: its scheduler's shift of %g is taken; its authors advise %g.",
            release.folder,
            recipe["shift"],
            advised,
        )


def _networks(
    release: Release,
    parts: Mapping[str, str | os.PathLike[str]],
    mesh: Mesh,
    dtype: DTypeLike,
    fields: Mapping[str, Any],
) -> dict[str, Network]:
    """The networks of a release, none of them read yet; see `load_release`."""
    if unknown := set(parts) - set(release.parts):
        raise ValueError(f"{release.folder} has no {', '.join(unknown)} to replace.")
    fields = {"scan_layers": platform() != "cpu"} | dict(fields)
    loaders = {
        "dit": partial(load_dit, mesh=mesh, dtype=dtype, **fields),
        "dit_low": partial(load_dit, mesh=mesh, dtype=dtype, **fields),
        "text_encoder": partial(load_text_encoder, mesh=mesh, dtype=dtype),
        "vae": partial(load_vae, mesh=mesh),
        "image_encoder": partial(load_image_encoder, mesh=mesh),
    }
    paths = release.parts | {name: pathlib.Path(path) for name, path in parts.items()}
    found = {name: loaders[name](path) for name, path in paths.items()}
    dit = found["dit"].module
    if "dit_low" in found and found["dit_low"].module != dit:
        raise ValueError(f"the experts of {release.folder} are of different sizes.")
    if not dit.image_width:
        found.pop("image_encoder", None)
    elif "image_encoder" not in found:
        raise FileNotFoundError(
            f"{release.folder} has no image encoder, and its network attends to a "
            "picture; download it (`image_encoder/`, or models_clip*.safetensors)."
        )
    return found


def with_adapters(
    model: Bundle,
    files: Sequence[tuple[str | os.PathLike[str], float]],
    networks: Sequence[str] = EXPERTS,
) -> Bundle:
    """The model with adapters from files, several together.

    Args:
        model: adapters that it has already stay.
        files: each with a factor of its strength.
        networks: which experts they are for, "dit" and "dit_low".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the adapters are of another network; lists what doesn't fit.
    """
    if not files:
        return model
    dit = model.dit
    inputs = dit.example_inputs()
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *inputs)["params"]
    channels = patch_channels(dit)
    tables = [dit_rules(layout, channels) for layout in LAYOUTS]
    if networks == EXPERTS[1:] and not model.boundary:
        raise ValueError(
            "adapters for low noise were given; this model has one expert."
        )
    held = {name: [tree] for name, tree in model.adapters.items()}
    for file, factor in files:
        tree = read_lora(file, tables, shapes)
        check(shapes, tree)
        for name in networks:
            held.setdefault(name, []).append(scaled(tree, factor))
    adapters = {name: stacked(trees) for name, trees in held.items()}
    return dataclasses.replace(model, adapters=adapters)
