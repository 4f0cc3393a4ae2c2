"""The flags of `python -m jvdit.sample`: requests, settings and the model they name."""

import dataclasses
import re
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from jvdit.diffusion.solvers import SOLVERS
from jvdit.generation import completion, shared_flags
from jvdit.generation.completion import size_fields
from jvdit.generation.fields import described, plain
from jvdit.generation.films import Film
from jvdit.generation.generator import Generator
from jvdit.generation.request import STATES, Request
from jvdit.generation.settings import PRESETS, SUITS, Settings
from jvdit.generation.sound_spans import read_span
from jvdit.sharding import make_mesh, parse_mesh, sampling_sizes
from jvdit.weights.adapters import strengths
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import EXPERTS, with_adapters

# What the flag of a field says besides the field's description.
_MORE = {
    "seed": "that of the first prompt; those of the others follow",
    "keyframes": "such as 0.5:a.png,1:b.png",
    "keep_sound": "0:0.5,0.9: keeps the first half second, and all from 0.9 s on",
    "levels": "such as 1,0.94,0.83,0.63",
}
_MORE |= dict.fromkeys([*completion.SUITS, *SUITS], "default: the model's")
_CHOICES = {"preset": PRESETS, "solver": SOLVERS}
_DEFINE: dict[type, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    tuple: flags.DEFINE_list,
}


def _defined(owner: type, *without: str) -> dict[str, flags.FlagHolder[Any]]:
    """Defines a flag for each field of a dataclass, as its docstring describes it."""
    texts, found = described(owner), {}
    for field in dataclasses.fields(owner):
        if (name := field.name) in without:
            continue
        more = f" ({_MORE[name]})" if name in _MORE else ""
        text = re.sub("`([a-z_]+)`", r"--\1", texts.get(name, name).removesuffix("."))
        text = f"{text[:1].upper()}{text[1:]}{more}."
        kind, default = plain(field), field.default
        if kind is tuple and default is not None:
            default = [str(x) for x in np.ravel(default)]
        if name in _CHOICES:
            found[name] = flags.DEFINE_enum(name, default, [*_CHOICES[name]], text)
        else:
            found[name] = _DEFINE[kind](name, default, text)
    return found


REQUEST = _defined(Request, "prompt", "height", "width", "tail", *STATES)
SETTINGS = _defined(Settings)
FILM = _defined(Film, "request", "frames", "footage", "scenes")
for _name, _original in (
    ("num_frames", "frames"),
    ("num_inference_steps", "steps"),
    ("last", "last_image"),
):
    flags.DEFINE_alias(_name, _original)

PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "File with a prompt a line, or with JSON lines that hold fields of a Request.",
)
OUT = flags.DEFINE_string("out", "samples", "Folder that the clips are written to.")
SIZE = flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH of the clips in pixels (default: the model's)."
)
CASCADE = flags.DEFINE_list(
    "cascade",
    [],
    "What to do with each clip then: interpolate, upscale, or both, each perhaps with "
    "a model of its own: upscale=WORKDIR.",
)
SECONDS = flags.DEFINE_float(
    "seconds",
    None,
    "Make a film that lasts so long, window after window of --frames. --edges, --guide "
    "and --camera then cover all of it, from its first frame on, --extend included.",
    lower_bound=0.0,
)
EXTEND = flags.DEFINE_string(
    "extend", None, "Video of any length that the film goes on from."
)
SCENE = flags.DEFINE_multi_string(
    "scene",
    [],
    "A scene of the film, as SECONDS:PROMPT; until the first, the prompt itself holds.",
)
SHIFT = flags.DEFINE_float(
    "shift",
    None,
    "Timestep shift of a released model's noise schedule (default: the folder's own).",
)
DIT = flags.DEFINE_string(
    "dit", None, "Folder or file of another network for a released model."
)
DIT_LOW = flags.DEFINE_string("dit_low", None, "The same, of the expert for low noise.")
LORA_HIGH = flags.DEFINE_multi_string(
    "lora_high", [], "Adapter files for the expert for high noise alone."
)
LORA_LOW = flags.DEFINE_multi_string(
    "lora_low", [], "Adapter files for the expert for low noise alone."
)
CHECK_LORA = flags.DEFINE_string(
    "check_lora",
    None,
    "Adapter file: say what of it the model reads, and generate nothing.",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Precision of a released model's weights and computation.",
)
VARIANT = flags.DEFINE_string(
    "variant", "", "Version of a released model's weights, such as fp16."
)
CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "File to write: how the network's output changes from step to step, measured on "
    "the first prompt, for --reuse.",
)
REUSE = flags.DEFINE_string(
    "reuse", None, "File of --calibrate: skip blocks where little changes (MagCache)."
)
THRESHOLD = flags.DEFINE_float(
    "reuse_threshold",
    0.06,
    "Error that --reuse may make; higher is faster, rougher.",
    lower_bound=0.0,
)
ROWS = flags.DEFINE_integer(
    "rows", 8, "Rows that are solved at once; fewer need less memory.", lower_bound=1
)
ENLARGED = flags.DEFINE_integer(
    "scale",
    None,
    "How many times to enlarge clips in their files, by whole pixels (default: until "
    "the short side has 256 pixels).",
    lower_bound=1,
)
MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices along each axis, such as data=2,context=4 (default: a row to a device, "
    "and what is left over shares the tokens of each row).",
)


def timed(flag: str, text: str, example: str) -> tuple[float, str]:
    """Seconds, and what follows the colon, of an entry of a flag."""
    time, _, what = text.partition(":")
    try:
        return float(time), what
    except ValueError:
        raise ValueError(f"--{flag} (={text!r}) must read {example}.") from None


def _span(text: str) -> tuple[float, float]:
    """Seconds from and until, of an entry of --keep_sound; without an end infinity."""
    example = "START:END in seconds, such as 0:0.5, or 0.9: until the end"
    try:
        return read_span(text)
    except ValueError:
        raise ValueError(f"--keep_sound (={text!r}) must read {example}.") from None


def common_fields() -> dict[str, Any]:
    """What the flags say of all requests."""
    fields = {name: flag.value for name, flag in REQUEST.items()}
    example = "SECONDS:PICTURE, such as 0.5:a.png"
    pictures = (timed("keyframes", x, example) for x in fields["keyframes"])
    fields |= {"references": (*fields["references"],), "keyframes": (*pictures,)}
    fields["keep_sound"] = tuple(map(_span, fields["keep_sound"]))
    return fields | size_fields({}, SIZE.value, None, None)


def sampling_settings() -> Settings:
    """What the flags say of sampling."""
    fields = {
        name: tuple(map(float, x)) if isinstance(x := flag.value, list) else x
        for name, flag in SETTINGS.items()
    }
    if SHIFT.value is not None and (fields["preset"] or fields["levels"]):
        raise ValueError("--shift spaces noise levels that --preset or --levels give.")
    return Settings(**fields)


def told_settings(settings: Settings, model: Bundle) -> dict[str, Any]:
    """What a clip's file says of how it was made, besides its request."""
    told = {k: x for k, x in dataclasses.asdict(settings).items() if x is not None}
    if settings.levels is None:
        told["shift"] = model.policy.shift
    if not model.boundary:
        told.pop("guidance_scale_2", None)
    if not model.dit.cond_channels:
        told.pop("control_guidance_scale")
    if not model.dit.control_channels:
        told.pop("conditioning_scale")
    if not model.has_sound:
        for name in [x for x in told if x.startswith(("sound_", "sync_"))]:
            told.pop(name)
    files = shared_flags.WORKDIR, shared_flags.PRETRAINED, DIT, DIT_LOW
    files += shared_flags.LORA, LORA_HIGH, LORA_LOW, REUSE, shared_flags.QUANTIZE
    return told | {flag.name: flag.value for flag in files if flag.value}


def named_mesh(prompts: int) -> Mesh:
    """The devices: a row to each, and what is left over divides the tokens of rows.

    Args:
        prompts: how many clips are asked for.
    """
    if MESH.value is not None:
        return make_mesh(parse_mesh(MESH.value))
    settings = sampling_settings()
    # Where one expert isn't guided, the other's pairs of rows follow one another.
    scales = settings.guidance_scale, settings.guidance_scale_2
    guided = 1 not in scales and not settings.preset
    rows = min(prompts, ROWS.value) * (2 if guided else 1)
    return make_mesh(sampling_sizes(rows, jax.device_count()))


def named_generator(mesh: Mesh) -> Generator:
    """The model that the flags name, with its adapters; says what room it takes.

    Raises:
        FileNotFoundError: the model or a part of it is missing.
        ValueError: flags contradict each other, or the folder holds something else.
    """
    model = named_bundle(mesh)
    for flag, networks in (
        (shared_flags.LORA, EXPERTS),
        (LORA_HIGH, EXPERTS[:1]),
        (LORA_LOW, EXPERTS[1:]),
    ):
        if files := strengths(flag.value):
            model = with_adapters(model, files, networks)
    if SETTINGS["guidance_scale_2"].value is not None and not model.boundary:
        raise ValueError("--guidance_scale_2 is for models of two experts.")
    generator = Generator(model, mesh, quantize=shared_flags.QUANTIZE.value or "")
    print(generator.room.told, file=sys.stderr)
    return generator


def named_bundle(mesh: Mesh) -> Bundle:
    """The model that the flags name, without their adapters; see `named_generator`."""
    if shared_flags.PRETRAINED.value is None:
        for flag in (DIT, DIT_LOW, SHIFT, VARIANT):
            if flag.value:
                raise ValueError(f"--{flag.name} goes with --pretrained.")
    parts = {x.name: x.value for x in (DIT, DIT_LOW) if x.value}
    how = {x.name: x.value for x in (DTYPE, SHIFT, VARIANT)}
    return shared_flags.named_bundle(mesh, parts=parts, **how)
