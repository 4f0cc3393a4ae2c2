"""Opens any finished model as a `Bundle`: one of our own, or a released one."""

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
from jvdit.models.lora import merged, parted, scaled, stacked
from jvdit.sharding import make_mesh, platform
from jvdit.weights import folders
from jvdit.weights.adapters import ANY, Adapters, left_out, read_lora
from jvdit.weights.bundle import Bundle, read_bundle
from jvdit.weights.encoders import release_tokenizer
from jvdit.weights.hub import adapter_file, release_folder
from jvdit.weights.parameters import Network, module_fields
from jvdit.weights.recipes import RECIPES, TEXT_LENGTH
from jvdit.weights.release import Release, is_release, read_release
from jvdit.weights.released_configs import PATCH_SIZE, conditions_of, patch_channels
from jvdit.weights.tensors import has_variant
from jvdit.weights.wan import LAYOUTS, dit_rules

EXPERTS = ("dit", "dit_low")


def open_bundle(
    folder: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: DTypeLike | None = None,
    shift: float | None = None,
    parts: Mapping[str, str | os.PathLike[str]] | None = None,
    variant: str = "",
    **fields: Any,
) -> Bundle:
    """Opens a model folder of our own, or a released model of the Wan 2 family.

    A released model takes its sampling settings from its folder, and those missing
    there from its authors' recommendations; scheduler settings that aren't followed are
    logged. Its networks are read from the files when they are first needed.

    Args:
        folder: a training workdir or its `model` folder; a pipeline in diffusers'
            layout, or its id on the Hugging Face Hub, such as "owner/name"; or the
            original release, with its files converted to safetensors.
        mesh: device mesh for a released model; by default all devices along `data`.
        dtype: dtype of a released model's parameters and computation, by default
            bfloat16; its autoencoder and image encoder are always float32.
        shift: timestep shift of a released model; None: that of its scheduler, or its
            authors' if the folder has none.
        parts: folders, or single files, of networks that replace a released model's
            own, by name: "dit", "dit_low".
        variant: version of a released model's weights, such as "fp16"; networks that
            lack it, and by default all, take the plain one.
        **fields: fields of `DiT` that a release doesn't set, such as `scan_layers`.

    Raises:
        FileNotFoundError: the model or a part of it is missing; says which.
        ValueError: the folder holds another model, or damaged files; or an argument
            that needs a released model was given for one of our own.
    """
    folder = release_folder(folder, variant)
    known = is_release(folder) or (folder / "generator.json").exists()
    if folder.is_file() or (not known and any(folder.glob("*.safetensors"))):
        raise ValueError(folders.lone(folder))
    if not is_release(folder):
        options = {"dtype": dtype, "shift": shift, "parts": parts, "variant": variant}
        if given := [name for name, x in (options | fields).items() if x]:
            told = " and ".join(given)
            raise ValueError(f"{told} go with a released model, and {folder} is none.")
        return read_bundle(folder)
    release = read_release(folder)
    if variant and not any(has_variant(x, variant) for x in release.parts.values()):
        raise ValueError(f"{folder} has no `variant` {variant!r}; leave it out.")
    where = {"mesh": make_mesh() if mesh is None else mesh, "variant": variant}
    fields = {"scan_layers": platform() != "cpu"} | fields
    networks = _networks(release, parts or {}, where, dtype or jnp.bfloat16, fields)
    return _released(release, networks, shift)


def _released(
    release: Release, networks: dict[str, Network], shift: float | None
) -> Bundle:
    """A released model, with the settings of its folder and its authors."""
    dit = networks["dit"].module
    recipe, scheduler = release.recipe(module_fields(dit)), release.scheduler
    _tell(release, recipe, shift)
    policy = scheduler.policy(recipe["shift"] if shift is None else shift)
    return Bundle(
        networks=networks,
        tokenizer=release_tokenizer(release.tokenizer),
        path=NoisePath(timesteps=scheduler.timesteps),
        policy=TimestepPolicy(**policy),
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
    """Logs scheduler settings that aren't followed, or that the authors advise against.

    The latter is a shift that differs from the authors' recommendation.
    """
    for note in release.scheduler.notes:
        logging.warning("%s: %s", release.folder, note)
    advised, own = RECIPES.get(recipe.get("release", ""), recipe), recipe["shift"]
    if shift is None and advised["shift"] != own:
        told = "%s: its scheduler's shift of %g is taken; its authors advise %g."
        logging.warning(told, release.folder, own, advised["shift"])


def _networks(
    release: Release,
    parts: Mapping[str, str | os.PathLike[str]],
    where: Mapping[str, Any],
    dtype: DTypeLike,
    fields: Mapping[str, Any],
) -> dict[str, Network]:
    """Opens the networks of a release, without reading their parameters yet."""
    if unknown := set(parts) - set(release.parts):
        raise ValueError(f"{release.folder} has no {', '.join(unknown)} to replace.")
    like = release.parts["dit"]
    dit = partial(folders.load_dit, dtype=dtype, like=like, **fields)
    text = partial(folders.load_text_encoder, dtype=dtype)
    loaders: dict[str, Any] = {"dit": dit, "dit_low": dit, "text_encoder": text}
    loaders |= {"vae": folders.load_vae, "image_encoder": folders.load_image_encoder}
    paths = release.parts | {name: pathlib.Path(path) for name, path in parts.items()}
    found = {name: loaders[name](path, **where) for name, path in paths.items()}
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
    """A copy of a model with adapters from files added: LoRA, DoRA, differences.

    What a file holds for layers that the network lacks is left out, and logged.

    Args:
        model: the model; adapters that it already has stay.
        files: pairs of an adapter file, or its id on the hub, and a factor that
            multiplies its scale.
        networks: the experts that get the adapters, of "dit" and "dit_low"; a file
            whose names tell the expert is for that one alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing in a file is for these networks, and the message lists why;
            or the model has no low-noise expert.
    """
    networks = [name for name in networks if name in model.networks]
    if not networks:
        raise ValueError("adapters for low noise were given to a model of one expert.")
    held = {name: [tree] for name, tree in model.adapters.items()}
    changed = model.networks
    for file, factor in files:
        found = adapters_of(model, file)
        if found.left:
            told = file, len(found.left), left_out(found.left)
            logging.warning("%s: %d tensors are left out: %s", *told)
        for name, tree in _by_expert(file, found, networks):
            low, rest = parted(tree)
            held.setdefault(name, []).append(scaled(low, factor))
            if rest:
                merge = partial(merged, changes=rest, factor=factor)
                changed = {**changed, name: changed[name].changed(merge)}
    adapters = {name: stacked(trees) for name, trees in held.items()}
    adapters = {name: tree for name, tree in adapters.items() if tree}
    return dataclasses.replace(model, adapters=adapters, networks=changed)


def adapters_of(model: Bundle, file: str | os.PathLike[str]) -> Adapters:
    """Reads a file of adapters for a model's network, as `read_lora` does."""
    dit = model.dit
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *dit.example_inputs())
    channels = patch_channels(dit)
    tables = [dit_rules(layout, channels) for layout in LAYOUTS]
    return read_lora(adapter_file(file), tables, shapes["params"])


def _by_expert(
    file: str | os.PathLike[str], found: Adapters, networks: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Each network that gets adapters of a file, and these."""
    pairs = []
    for expert, tree in found.trees.items():
        # Beside names that tell an expert, names that don't are for the other one.
        free = [name for name in networks if name not in found.trees] or networks
        names = free if expert == ANY else [x for x in networks if x == expert]
        pairs += [(name, tree) for name in names]
    if not pairs:
        raise ValueError(
            f"{file} is for {' and '.join(found.trees)} by the names in it, and asked "
            f"for was {' and '.join(networks)}; give it to a model of two experts by "
            "--lora."
        )
    return pairs
