"""Finds the parts of a released model in its folder.

The layout is that of a diffusers pipeline (`model_index.json`, and a folder for each
part), or that of the original release: the DiT in the folder itself, or each expert in
a folder of its own, beside the files of the other networks.
"""

import dataclasses
import pathlib
from typing import Any

import msgspec
from msgspec import UNSET

from jvdit.machine.json_files import read_json
from jvdit.weights.recipes import NEGATIVE_PROMPT, POLICY, RECIPES, TIMESTEPS, name_of
from jvdit.weights.tensors import PathLike

# Classes whose solver we have; for others the nearest solver, by the first part of the
# name that matches.
_SAME = {
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchLCMScheduler": "renoise",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
_NEAREST = {"Heun": "heun", "FlowMatch": "euler", "DPM": "dpmpp_2m", "": "unipc"}
# The `solver_type` that our solvers implement.
_SOLVER_TYPES = {"unipc": "bh2", "dpmpp_2m": "midpoint"}


class SchedulerConfig(msgspec.Struct, frozen=True):
    """A `scheduler_config.json`; the defaults are what our solvers do.

    With other values of the first three the model isn't one of Wan's. FlowMatch classes
    don't have the first two.
    """

    prediction_type: Any = "flow_prediction"
    use_flow_sigmas: Any = True
    num_train_timesteps: Any = TIMESTEPS
    kind: str = msgspec.field(name="_class_name", default="")
    shift: float | None = None
    flow_shift: float | None = None
    solver_order: Any = 2
    solver_type: Any = UNSET
    algorithm_type: Any = "dpmsolver++"
    predict_x0: Any = True
    solver_p: Any = None
    disable_corrector: Any = []
    lower_order_final: Any = True
    euler_at_final: Any = False
    final_sigmas_type: Any = "zero"
    thresholding: Any = False
    stochastic_sampling: Any = False
    use_dynamic_shifting: Any = False
    use_karras_sigmas: Any = False
    use_exponential_sigmas: Any = False
    use_beta_sigmas: Any = False
    use_lu_lambdas: Any = False
    shift_terminal: Any = None
    invert_sigmas: Any = False


_OURS = msgspec.structs.asdict(SchedulerConfig())
_NEEDED, _FOLLOWED = [*_OURS][:3], [*_OURS][6:]


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The solver and timestep spacing of a released model.

    Attributes:
        kind: the scheduler's class in diffusers; "": the folder has none.
        shift: the scheduler's timestep shift; None: it has none.
        notes: a sentence for each setting that isn't followed.
    """

    kind: str = ""
    shift: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The name in `SOLVERS` of the same solver, or of the nearest one."""
        return _solver(self.kind)

    @property
    def timesteps(self) -> int:
        """`NoisePath.timesteps`: how many discrete timesteps there are; 0: any t."""
        return 0 if _flow_match(self.kind) else TIMESTEPS

    def policy(self, shift: float) -> dict[str, Any]:
        """The fields of `TimestepPolicy` that space times as this scheduler does."""
        spacing: dict[str, Any] = {}
        if _flow_match(self.kind):
            # It shifts the end of the spacing twice: by itself, then with the rest.
            end = shift / (TIMESTEPS + shift - 1)
            spacing = {"grid": (1.0, end), "reach_end": True}
        elif self.kind == "DPMSolverMultistepScheduler":
            spacing = {"grid": (1.0, 0.0), "start": 1 - 1 / TIMESTEPS}
        return {"shift": shift, **POLICY, **spacing}


def scheduler_of(kind: str, config: SchedulerConfig) -> Scheduler:
    """Translates a `scheduler_config.json`.

    Args:
        kind: the scheduler's class in diffusers, or "" if it isn't known.
        config: the contents of the file.

    Raises:
        ValueError: it is the scheduler of a model that isn't one of Wan's.
    """
    for name in _NEEDED[2:] if _flow_match(kind) else _NEEDED:
        if (found := getattr(config, name)) != _OURS[name]:
            raise ValueError(
                f"`{name}` (={found!r}) of the {kind or 'scheduler'} must be "
                f"{_OURS[name]!r}, as Wan's networks were trained; correct its "
                "scheduler_config.json."
            )
    solver, notes = _solver(kind), []
    if kind and kind not in _SAME:
        notes.append(
            f"{kind} isn't among our solvers; the nearest, {solver!r}, is taken."
        )
    ours = _OURS | {"solver_type": _SOLVER_TYPES.get(solver, config.solver_type)}
    for name in _FOLLOWED if kind in _SAME else ():
        if (found := getattr(config, name)) not in (ours[name], UNSET):
            notes.append(
                f"`{name}` (={found!r}) of {kind} isn't followed; {solver!r} "
                f"samples as with {ours[name]!r}."
            )
    first, second = config.shift, config.flow_shift
    if not _flow_match(kind):
        first, second = second, first
    return Scheduler(kind, second if first is None else first, tuple(notes))


def _solver(kind: str) -> str:
    nearest = next(ours for part, ours in _NEAREST.items() if part in kind)
    return _SAME.get(kind, nearest)


def _flow_match(kind: str) -> bool:
    return kind.startswith("FlowMatch")


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
    parts = {part: _there(folder / name) for part, name in names.items()}
    tokenizer, clean = _tokenizer(folder / "tokenizer"), bool(index.expand_timesteps)
    return Release(folder, parts, tokenizer, clean, settings, scheduler)


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
    tokenizer = _tokenizer(folder / "google/umt5-xxl")
    return Release(folder, parts, tokenizer, kind == "ti2v", {})


def _there(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; download the release anew.")
    return path


def _tokenizer(folder: pathlib.Path) -> pathlib.Path:
    for name in ("spiece.model", "tokenizer.json"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has neither spiece.model nor tokenizer.json.")
