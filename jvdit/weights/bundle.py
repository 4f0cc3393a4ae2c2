"""A finished model as one object, and the `model` folder that holds one of our own.

`opening.py` opens a released model as well.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec

from jvdit.data.conditions import check_conditions, check_given
from jvdit.data.tokenizer import Tokenizer
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.machine.json_files import read_json, write_json
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.backbones import MODELS, Backbone, name_of_backbone
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.encoders import CaptionEncoder
from jvdit.weights.parameters import Network, load_network, model_folder


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A finished model: its networks, and all settings needed to use them.

    Attributes:
        networks: networks by name: "dit", "text_encoder" and "vae", which holds the
            statistics of its latents. A model with two experts has "dit" for high noise
            and "dit_low" for t below `boundary`; one whose tokens attend to an image
            has an "image_encoder", one with sound an "audio_vae".
        tokenizer: tokenizer of the prompts.
        path, policy: noise path and timesteps that the network was trained with.
        patch_size: latent frames, height and width of a token.
        text_length: most tokens of a prompt; longer prompts are cut.
        conditions: what a request may give besides its prompt, names in `CONDITIONS`.
        seconds: RoPE positions in time count seconds. False: latent frames, as in Wan.
        pad_text: every token attends to `text_length` text states, zeros past the end
            of the prompt, as in Wan. False: to those of the prompt alone.
        boundary: time t below which "dit_low" takes over; 0: there is one network.
        defaults: the model's defaults for fields of `Request` and `Settings`.
        adapters: LoRA adapters of "dit" and "dit_low", with their scale multiplied in.
        text_release: folder of the released model whose text encoder this is, or "".
        sources: names of what the model was trained on, as far as it is known.
        pictures: a model that generates the images of drafts; None: this one does.

    Raises:
        ValueError: a condition is unknown.
    """

    networks: Mapping[str, Network]
    tokenizer: Tokenizer
    path: NoisePath
    policy: TimestepPolicy
    patch_size: tuple[int, int, int]
    text_length: int
    conditions: tuple[str, ...] = ()
    seconds: bool = True
    pad_text: bool = False
    boundary: float = 0.0
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_release: str = ""
    sources: tuple[str, ...] = ()
    pictures: "Bundle | None" = None

    def __post_init__(self):
        check_conditions(self.conditions)

    @property
    def dit(self) -> Backbone:
        """The backbone, which denoises; with two experts, that for high noise."""
        return self.networks["dit"].module

    @property
    def vae(self) -> VideoVAE:
        """The video autoencoder."""
        return self.networks["vae"].module

    @property
    def audio_vae(self) -> AudioVAE:
        """The audio autoencoder.

        Raises:
            ValueError: the model has no sound.
        """
        if not self.has_sound:
            raise ValueError(
                "this model has no sound; train one with `data.sound_budget`, or ask "
                "for a clip without."
            )
        return self.networks["audio_vae"].module

    @property
    def has_sound(self) -> bool:
        """Whether the model generates sound."""
        return "audio_vae" in self.networks

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder."""
        return self.networks["text_encoder"].module

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """The image encoder, or None if the tokens attend to no image."""
        network = self.networks.get("image_encoder")
        return None if network is None else network.module

    def with_params(self, params: Mapping[str, Any]) -> "Bundle":
        """A copy of the model with other parameters for some networks, by name."""
        changed = {
            name: dataclasses.replace(self.networks[name], source=source, shapes=None)
            for name, source in params.items()
        }
        return dataclasses.replace(self, networks={**self.networks, **changed})

    def check_given(self, given: Sequence[str]) -> None:
        """Raises a ValueError if the model doesn't take these fields of a request."""
        check_given(self.conditions, given)

    def check_draft(self) -> None:
        """Raises a ValueError unless a first frame may, but need not, be given."""
        if "first_frame" not in self.conditions:
            raise ValueError(
                "`draft` needs a model that may, but need not, be given a first frame; "
                "one that is trained with config.given.first_frame."
            )


PICTURES = "pictures"  # subfolder with the model that generates the images of drafts
_SETTINGS = "generator.json"
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
    boundary: float = 0.0
    conventions: _Conventions | None = None

    def __post_init__(self):
        if self.backbone not in MODELS:
            known = ", ".join(MODELS)
            raise ValueError(f"`backbone` (={self.backbone!r}) must be one of: {known}")
        check_conditions(self.conditions)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `Bundle`, converted from the form of older trainings."""
        own = ("backbone", "conventions")
        fields = {x: getattr(self, x) for x in self.__struct_fields__ if x not in own}
        if (older := self.conventions) is not None:
            fields["conditions"] = ("first_frame",) if older.clean_frames else ()
            fields |= {"seconds": older.seconds, "pad_text": older.pad_text}
        return fields


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
    backbone = MODELS[settings.backbone].module
    modules = {"dit": backbone, "vae": VideoVAE}
    if settings.boundary:
        modules["dit_low"] = backbone
    if (folder / "audio_vae").is_dir():
        modules["audio_vae"] = AudioVAE
    for name, module in modules.items():
        networks[name] = load_network(folder / name, module)
    if bool(networks["dit"].module.sound_channels) != ("audio_vae" in networks):
        raise FileNotFoundError(
            f"{folder} must hold dit/ and audio_vae/ that belong together: {remedy}."
        )
    pictures = folder / PICTURES
    return Bundle(
        networks={name: _full(network) for name, network in networks.items()},
        tokenizer=text.tokenizer,
        text_release=text.release,
        pictures=read_bundle(pictures) if pictures.is_dir() else None,
        **settings.fields,
    )


def sources_of(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of what the model of a training was trained on; none of other models."""
    return getattr(_settings_of(folder), "sources", ())


def conditions_of(folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """The conditions of the model of a training; none of other models."""
    return getattr(_settings_of(folder), "conditions", ())


def _settings_of(folder: str | os.PathLike[str]) -> _ModelSettings | None:
    settings = model_folder(folder) / _SETTINGS
    if not settings.exists():
        return None
    return read_json(settings, "copy it anew", _ModelSettings)


def save_bundle(folder: str | os.PathLike[str], model: Bundle) -> None:
    """Saves a whole model in one folder, for `read_bundle`."""
    folder = pathlib.Path(folder)
    experts = ("dit", "dit_low")[: 2 if model.boundary else 1]
    for name in (*experts, "vae", *["audio_vae"] * model.has_sound):
        model.networks[name].save(folder / name)
    text = model.networks["text_encoder"], model.tokenizer, model.text_release
    CaptionEncoder(*text).save(folder)
    names = {*_ModelSettings.__struct_fields__} - {"backbone", "conventions"}
    settings = {name: msgspec.to_builtins(getattr(model, name)) for name in names}
    settings["backbone"] = name_of_backbone(model.dit)
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
