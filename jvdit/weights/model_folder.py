"""Reads and writes `model` folders: a finished model with all that sampling needs."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import msgspec

from jvdit.data.conditions import check_conditions
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.backbones import MODELS, name_of_backbone
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.bundle import Bundle
from jvdit.weights.caption_encoder import CaptionEncoder
from jvdit.weights.network import Network, load_network
from jvdit.weights.parameters import (
    model_folder,
    module_fields,
    save_weights,
)

PICTURES = "pictures"  # subfolder with the model that generates the images of drafts
_SETTINGS = "generator.json"
_NETWORKS = ("dit", "vae")
# What a training may write in the place of a whole model, and how to sample from it.
_PARTS = {
    "pytorch_lora_weights.safetensors": "adapters; give their model, and --lora={0}",
    "transformer": "a network; give --pretrained=RELEASE --dit={0}/transformer",
    "transformer_2": "a network; give --pretrained=RELEASE --dit_low={0}/transformer_2",
}


class _Conventions(msgspec.Struct, frozen=True):
    """The fields in which older trainings stored a model's conventions."""

    seconds: bool = True
    pad_text: bool = False
    clean_frames: bool = False


class _ModelSettings(msgspec.Struct, frozen=True):
    """The contents of `generator.json`: fields of a `Bundle`."""

    path: NoisePath
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    defaults: dict[str, Any]
    backbone: str = "dit"
    conditions: tuple[str, ...] = ()
    seconds: bool = True
    pad_text: bool = False
    sources: tuple[str, ...] = ()
    conventions: _Conventions | None = None

    def __post_init__(self):
        if self.backbone not in MODELS:
            known = ", ".join(MODELS)
            raise ValueError(f"`backbone` (={self.backbone!r}) must be one of: {known}")
        check_conditions(self.conditions)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Bundle`, converted from the form of older trainings."""
        names = ("path", "policy", *_WRITTEN)
        fields = {name: getattr(self, name) for name in names}
        if (older := self.conventions) is not None:
            fields["conditions"] = ("first_frame",) if older.clean_frames else ()
            fields |= {"seconds": older.seconds, "pad_text": older.pad_text}
        return fields


_WRITTEN = ("patch_size", "text_length", "defaults", "conditions")
_WRITTEN += ("seconds", "pad_text", "sources")


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Reads a model that `save_bundle` wrote.

    Args:
        folder: a training workdir, or the `model` folder in it.

    Raises:
        FileNotFoundError: the model or a part of it is missing; says which.
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
    settings = read_json(folder / _SETTINGS, remedy, _ModelSettings)
    text = CaptionEncoder.load(folder)
    networks = {"text_encoder": text.network}
    modules = {"dit": MODELS[settings.backbone].module, "vae": VideoVAE}
    for name in _NETWORKS:
        networks[name] = load_network(folder / name, modules[name])
    pictures = folder / PICTURES
    return Bundle(
        networks={name: _full(network) for name, network in networks.items()},
        tokenizer=text.tokenizer,
        text_release=text.release,
        pictures=read_bundle(pictures) if pictures.is_dir() else None,
        **settings.fields,
    )


def save_bundle(folder: str | os.PathLike[str], model: Bundle) -> None:
    """Saves a whole model in one folder, for `read_bundle`."""
    folder = pathlib.Path(folder)
    for name in _NETWORKS:
        network = model.networks[name]
        save_weights(folder / name, network.params, module_fields(network.module))
    text = model.networks["text_encoder"], model.tokenizer, model.text_release
    CaptionEncoder(*text).save(folder)
    settings = {name: getattr(model, name) for name in _WRITTEN}
    settings |= {
        "path": dataclasses.asdict(model.path),
        "policy": dataclasses.asdict(model.policy),
        "backbone": name_of_backbone(model.dit),
    }
    write_json(folder / _SETTINGS, settings)
    if model.pictures is not None:
        save_bundle(folder / PICTURES, model.pictures)


def _full(network: Network) -> Network:
    """Casts parameters to the network's own dtype; files may hold fewer bits."""
    if callable(network.source):
        return network
    full = network.module.param_dtype
    params = jax.tree.map(lambda x: x.astype(full), network.source)
    return dataclasses.replace(network, source=params)
