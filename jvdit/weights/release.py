"""Finds the parts of a released model in its folder.

The layout is that of a diffusers pipeline (`model_index.json`, and a folder for each
part), or that of the original release: the DiT in the folder itself, or each expert in
a folder of its own, beside the files of the other networks.
"""

import dataclasses
import pathlib
from typing import Any

import msgspec

from jvdit.machine.json_files import read_json
from jvdit.weights.recipes import NEGATIVE_PROMPT, RECIPES, name_of
from jvdit.weights.schedulers import Scheduler, SchedulerConfig, scheduler_of
from jvdit.weights.tensors import PathLike

# File names of the original release; the files must be converted to safetensors.
_ORIGINAL = {
    "text_encoder": "models_t5*",
    "vae": "Wan2.?_VAE*",
    "image_encoder": "models_clip*",
}
_AGAIN = "download it again"
_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")


_Part = tuple[str | None, str | None] | None  # library and class


class _Pipeline(msgspec.Struct, frozen=True):
    """The fields that we use of diffusers' `model_index.json`."""

    kind: str | None = msgspec.field(name="_class_name", default=None)
    scheduler: _Part = None
    transformer_2: _Part = None
    image_encoder: _Part = None
    boundary_ratio: float | None = None
    expand_timesteps: bool | None = None


class _Original(msgspec.Struct, frozen=True):
    """The field that we use of the `config.json` in an original release."""

    model_type: str = ""


@dataclasses.dataclass(frozen=True)
class Release:
    """The parts of a released model.

    Attributes:
        folder: the folder of the whole release.
        parts: path of each network: "dit", "text_encoder", "vae", and if there are,
            "dit_low" (the low-noise expert) and "image_encoder".
        tokenizer: the tokenizer's file, a sentencepiece model or a `tokenizer.json`.
        clean_frames: the network takes a first frame as clean tokens (TI2V).
        settings: sampling settings from the folder's own configuration.
        scheduler: the solver and timestep spacing of the folder's scheduler.
    """

    folder: pathlib.Path
    parts: dict[str, pathlib.Path]
    tokenizer: pathlib.Path
    clean_frames: bool
    settings: dict[str, Any]
    scheduler: Scheduler = Scheduler()

    def recipe(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The sampling settings: steps, shift, guidance, size, negative prompt, ….

        Shift, solver and boundary come from the folder's own configuration, as in
        diffusers; everything else from the authors' recommendations if they are known.

        Args:
            fields: the fields of its `DiT`, by which the release is recognised.
        """
        name = name_of(fields, "dit_low" in self.parts)
        if name is None:
            plain = RECIPES["wan2.1-t2v-1.3b"] | {"guidance_scale": 5.0, "shift": 3.0}
            return plain | {"negative_prompt": NEGATIVE_PROMPT} | self.settings
        return RECIPES[name] | {"release": name} | self.settings


def is_release(folder: PathLike) -> bool:
    """Whether a folder has the layout of a released model."""
    folder = pathlib.Path(folder)
    if (folder / "model_index.json").exists():
        return True
    return (folder / "high_noise_model").is_dir() or (
        (folder / "config.json").exists() and bool(list(folder.glob("Wan2.?_VAE*")))
    )


def read_release(folder: PathLike) -> Release:
    """Finds the parts of a released model.

    Raises:
        FileNotFoundError: the folder or a part is missing; says which.
        ValueError: the folder holds a model of another family.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder; give that of a released model, as diffusers or "
            "Wan's authors lay it out."
        )
    if (file := folder / "model_index.json").exists():
        return _diffusers(folder, read_json(file, _AGAIN, _Pipeline))
    return _original(folder)


def _diffusers(folder: pathlib.Path, index: _Pipeline) -> Release:
    if index.kind not in _PIPELINES:
        raise ValueError(
            f"{folder} is a {index.kind}; known are {', '.join(_PIPELINES)}, of Wan 2 "
            "(`_class_name` of its model_index.json)."
        )
    names = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae"}
    optional = {"dit_low": "transformer_2", "image_encoder": "image_encoder"}
    names |= {k: v for k, v in optional.items() if (getattr(index, v) or [None])[0]}
    settings: dict[str, Any] = {}
    if "dit_low" in names and index.boundary_ratio is not None:
        settings["boundary"] = index.boundary_ratio
    file, config = folder / "scheduler" / "scheduler_config.json", SchedulerConfig()
    if file.exists():
        config = read_json(file, _AGAIN, SchedulerConfig)
    scheduler = scheduler_of((index.scheduler or ("", ""))[1] or config.kind, config)
    if scheduler.kind:
        settings["solver"] = scheduler.solver
    if scheduler.shift is not None:
        settings["shift"] = scheduler.shift
    return Release(
        folder,
        {part: _there(folder / name) for part, name in names.items()},
        _tokenizer(folder / "tokenizer"),
        bool(index.expand_timesteps),
        settings,
        scheduler,
    )


def _original(folder: pathlib.Path) -> Release:
    high, low = folder / "high_noise_model", folder / "low_noise_model"
    parts = {"dit": folder}
    if high.is_dir():
        parts = {"dit": high, "dit_low": _there(low)}
    config = _there(parts["dit"] / "config.json")
    kind = read_json(config, _AGAIN, _Original).model_type
    for part, pattern in _ORIGINAL.items():
        found = sorted(folder.glob(pattern))
        best = [x for x in found if x.suffix == ".safetensors"] or found
        if best:
            parts[part] = best[0]
        elif part != "image_encoder":
            raise FileNotFoundError(
                f"{folder} has no {pattern}, of the original release; download it, or "
                "give a folder as diffusers saves it."
            )
    return Release(
        folder, parts, _tokenizer(folder / "google/umt5-xxl"), kind == "ti2v", {}
    )


def _there(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; download the release anew.")
    return path


def _tokenizer(folder: pathlib.Path) -> pathlib.Path:
    for name in ("spiece.model", "tokenizer.json"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has neither spiece.model nor tokenizer.json.")
