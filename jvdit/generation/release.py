"""A released model as a `Generator`: `load_release(folder)`."""

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
from jvdit.generation.generator import Generator
from jvdit.generation.residence import fits_together
from jvdit.models.lora import check, scaled, stacked
from jvdit.sharding import make_mesh, platform
from jvdit.weights.adapters import read_lora
from jvdit.weights.caption_encoder import release_tokenizer
from jvdit.weights.configs import PATCH_SIZE, patch_channels
from jvdit.weights.conventions import Conventions
from jvdit.weights.folders import (
    Loaded,
    load_dit,
    load_image_encoder,
    load_text_encoder,
    load_vae,
)
from jvdit.weights.parameters import module_fields
from jvdit.weights.recipes import RECIPES, TEXT_LENGTH
from jvdit.weights.release import Release, read_release
from jvdit.weights.wan import LAYOUTS, dit_rules

EXPERTS = ("dit", "dit_low")
_ITS_OWN: Mapping[str, str] = {}


def load_release(
    folder: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    shift: float | None = None,
    parts: Mapping[str, str | os.PathLike[str]] = _ITS_OWN,
    **fields: Any,
) -> Generator:
    """A model of the Wan 2 family, to be sampled as its folder and authors say.

    What its scheduler asks for and we do otherwise is logged, a line each.
    Its networks are read from the files when their turn comes. If they don't all fit on
    the devices, one is there at a time.

    Args:
        folder: as diffusers saves a pipeline, or of the original release with its files
            turned to safetensors.
        mesh: of the devices; default: all of them on `data`.
        dtype: of the parameters and the computation; the autoencoder's are float32.
        shift: of the times, see `TimestepPolicy`; None: that of the folder's scheduler,
            or its authors' where it has none.
        parts: folders of networks in the place of the release's own, by name: "dit" and
            "dit_low" of a finetuning.
        **fields: of `DiT` that the release doesn't decide, such as `scan_layers`.

    Raises:
        FileNotFoundError: a part is missing; says which.
        ValueError: the folder holds another model, or damaged files.
    """
    release = read_release(folder)
    mesh = make_mesh() if mesh is None else mesh
    found = _networks(release, parts, mesh, dtype, fields)
    dit = found["dit"].module
    recipe, scheduler = release.recipe(module_fields(dit)), release.scheduler
    _tell(release, recipe, shift)
    image_encoder = found.get("image_encoder")
    return Generator(
        dit=dit,
        text_encoder=found["text_encoder"].module,
        vae=found["vae"].module,
        params={name: part.load for name, part in found.items()},
        tokenizer=release_tokenizer(release.tokenizer),
        path=NoisePath(timesteps=scheduler.timesteps),
        policy=TimestepPolicy(
            **scheduler.policy(recipe["shift"] if shift is None else shift)
        ),
        patch_size=PATCH_SIZE,
        text_length=TEXT_LENGTH,
        defaults=recipe,
        mesh=mesh,
        conventions=Conventions(
            seconds=False,
            pad_text=True,
            clean_frames=release.clean_frames,
        ),
        boundary=recipe["boundary"],
        text_release=str(pathlib.Path(folder).absolute()),
        image_encoder=None if image_encoder is None else image_encoder.module,
        together=fits_together(sum(part.num_bytes for part in found.values()), mesh),
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
) -> dict[str, Loaded]:
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


def add_adapters(
    generator: Generator,
    files: Sequence[tuple[str | os.PathLike[str], float]],
    networks: Sequence[str] = EXPERTS,
) -> None:
    """Lets a model sample with adapters from files, several together.

    Args:
        generator: the model; adapters that it has already stay.
        files: each with a factor of its strength.
        networks: which experts they are for, "dit" and "dit_low".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the adapters are of another network; lists what doesn't fit.
    """
    if not files:
        return
    dit = generator.dit
    inputs = dit.example_inputs()
    shapes = jax.eval_shape(dit.init, jax.random.key(0), *inputs)["params"]
    channels = patch_channels(dit)
    tables = [dit_rules(layout, channels) for layout in LAYOUTS]
    if networks == EXPERTS[1:] and not generator.boundary:
        raise ValueError(
            "adapters for low noise were given; this model has one expert."
        )
    held = {name: [tree] for name, tree in generator.adapters.items()}
    for file, factor in files:
        tree = read_lora(file, tables, shapes)
        check(shapes, tree)
        for name in networks:
            held.setdefault(name, []).append(scaled(tree, factor))
    generator.adapters = {name: stacked(trees) for name, trees in held.items()}
