"""The `model` folder of a training: what sampling needs, and nothing else."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.dit import DiT
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.caption_encoder import CaptionEncoder
from jvdit.weights.conventions import Conventions
from jvdit.weights.parameters import (
    build,
    load_weights,
    model_folder,
    module_fields,
    save_weights,
)

PICTURES = "pictures"  # a model in the folder of another, which draws first frames
_MODULES = {"dit": DiT, "vae": VideoVAE}
# What a training may leave in the place of a whole model, and how it is sampled.
_PARTS = {
    "pytorch_lora_weights.safetensors": "adapters; give their model, and --lora={0}",
    "transformer": "a network; give --pretrained=RELEASE --dit={0}/transformer",
    "transformer_2": "a network; give --pretrained=RELEASE --dit_low={0}/transformer_2",
}


def pictures_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Where the model is that draws the first frames for the one of a folder."""
    return model_folder(folder) / PICTURES


def read_model(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a `Generator` that `write_model` wrote, by name.

    Args:
        folder: a workdir, or the `model` folder in it.

    Raises:
        FileNotFoundError: there is no such model; says what is missing.
    """
    folder = model_folder(folder)
    settings_file = folder / "generator.json"
    for part, told in _PARTS.items():
        if (folder / part).exists():
            told = told.format(folder)
            raise FileNotFoundError(f"{folder} is no whole model but {told}.")
    if not settings_file.exists():
        raise FileNotFoundError(
            f"{folder} holds no text-to-video model (generator.json is missing); "
            "give the workdir of a training with config.objective = 'flow'."
        )
    settings = read_json(settings_file, "copy it anew, or let the training save it")
    text = CaptionEncoder.load(folder)
    modules, params = {"text_encoder": text.module}, {"text_encoder": text.params}
    for name, module in _MODULES.items():
        params[name], fields = load_weights(folder / name)
        modules[name] = build(module, fields)
    for name, tree in params.items():
        if not callable(tree):  # a folder may hold them in fewer bits
            full = modules[name].param_dtype
            params[name] = jax.tree.map(lambda x, full=full: x.astype(full), tree)
    return {
        **modules,
        "params": params,
        "tokenizer": text.tokenizer,
        "path": NoisePath(**settings["path"]),
        "policy": TimestepPolicy.of(settings["policy"]),
        "patch_size": tuple(settings["patch_size"]),
        "text_length": settings["text_length"],
        "defaults": settings["defaults"],
        "conventions": Conventions(**settings.get("conventions", {})),
        "text_release": text.release,
    }


def write_model(folder: str | os.PathLike[str], generator: Any) -> None:
    """Writes the folder of a `Generator`."""
    folder = pathlib.Path(folder)
    for name in _MODULES:
        fields = module_fields(getattr(generator, name))
        save_weights(folder / name, generator.params[name], fields)
    text = generator.text_encoder, generator.params["text_encoder"], generator.tokenizer
    CaptionEncoder(*text, generator.text_release).save(folder)
    write_json(
        folder / "generator.json",
        {
            "path": dataclasses.asdict(generator.path),
            "policy": dataclasses.asdict(generator.policy),
            "patch_size": generator.patch_size,
            "text_length": generator.text_length,
            "defaults": generator.defaults,
            "conventions": dataclasses.asdict(generator.conventions),
        },
    )
