"""The `model` folder of a training: what sampling needs, and nothing else."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.backbones import MODELS, name_of_backbone
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.bundle import Bundle
from jvdit.weights.caption_encoder import CaptionEncoder
from jvdit.weights.network import Network
from jvdit.weights.parameters import (
    build,
    load_weights,
    model_folder,
    module_fields,
    save_weights,
)

PICTURES = "pictures"  # a model in the folder of another, which draws its drafts
_SETTINGS = "generator.json"
_NETWORKS = ("dit", "vae")
# Fields of a `Bundle` that are JSON values as they are.
_PLAIN = ("patch_size", "text_length", "defaults", "conditions", "seconds", "pad_text")
# What a training may leave in the place of a whole model, and how it is sampled.
_PARTS = {
    "pytorch_lora_weights.safetensors": "adapters; give their model, and --lora={0}",
    "transformer": "a network; give --pretrained=RELEASE --dit={0}/transformer",
    "transformer_2": "a network; give --pretrained=RELEASE --dit_low={0}/transformer_2",
}


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """The model that `save_bundle` wrote.

    Args:
        folder: a workdir, or the `model` folder in it.

    Raises:
        FileNotFoundError: there is no such model; says what is missing.
        ValueError: a file is damaged.
    """
    folder = model_folder(folder)
    for part, told in _PARTS.items():
        if (folder / part).exists():
            told = told.format(folder)
            raise FileNotFoundError(f"{folder} is no whole model but {told}.")
    if not (folder / _SETTINGS).exists():
        raise FileNotFoundError(
            f"{folder} holds no text-to-video model ({_SETTINGS} is missing); "
            "give the workdir of a training with config.objective = 'flow'."
        )
    remedy = "copy it anew, or let the training save it"
    settings = _migrated(read_json(folder / _SETTINGS, remedy))
    text = CaptionEncoder.load(folder)
    networks = {"text_encoder": text.network}
    modules = {"dit": MODELS[settings["backbone"]].module, "vae": VideoVAE}
    for name in _NETWORKS:
        params, fields = load_weights(folder / name)
        networks[name] = Network(build(modules[name], fields), params)
    pictures = folder / PICTURES
    plain = {name: settings[name] for name in _PLAIN}
    return Bundle(
        networks={name: _full(network) for name, network in networks.items()},
        tokenizer=text.tokenizer,
        path=NoisePath(**settings["path"]),
        policy=TimestepPolicy.of(settings["policy"]),
        text_release=text.release,
        pictures=read_bundle(pictures) if pictures.is_dir() else None,
        **{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()},
    )


def save_bundle(folder: str | os.PathLike[str], model: Bundle) -> None:
    """Writes a folder that `read_bundle` reads and that needs nothing else."""
    folder = pathlib.Path(folder)
    for name in _NETWORKS:
        network = model.networks[name]
        save_weights(folder / name, network.params, module_fields(network.module))
    text = model.networks["text_encoder"], model.tokenizer, model.text_release
    CaptionEncoder(*text).save(folder)
    parts = {"path": model.path, "policy": model.policy}
    settings = {name: dataclasses.asdict(part) for name, part in parts.items()}
    settings |= {name: getattr(model, name) for name in _PLAIN}
    settings["backbone"] = name_of_backbone(model.dit)
    write_json(folder / _SETTINGS, settings)
    if model.pictures is not None:
        save_bundle(folder / PICTURES, model.pictures)


def _migrated(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are written today, of those that older trainings wrote."""
    older = settings.pop("conventions", {})
    conditions = ["first_frame"] if older.get("clean_frames") else []
    before = {"conditions": conditions, "seconds": True, "pad_text": False}
    before |= {name: older[name] for name in before if name in older}
    return {"backbone": "dit"} | before | settings


def _full(network: Network) -> Network:
    """The network with parameters of its own type: a folder may hold fewer bits."""
    if callable(network.source):
        return network
    full = network.module.param_dtype
    params = jax.tree.map(lambda x: x.astype(full), network.source)
    return dataclasses.replace(network, source=params)
