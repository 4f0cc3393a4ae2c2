"""The flags of `python -m jvdit.sample`, and what they say of requests and settings."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from absl import flags

from jvdit.diffusion.solvers import SOLVERS
from jvdit.generation.completion import size_fields
from jvdit.generation.presets import PRESETS
from jvdit.generation.settings import Settings
from jvdit.weights.bundle import Bundle
from jvdit.weights.few_bits import FORMS

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a training run, or of its finished model (default: the small model in "
    "the box).",
)
PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "Folder of a released Wan 2 model, or its id on the Hugging Face Hub, instead of "
    "--workdir.",
)
PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "File with a prompt a line, or with JSON lines that hold fields of a Request.",
)
OUT = flags.DEFINE_string("out", "samples", "Folder that the clips are written to.")


def _left(define: Callable[..., Any], name: str, text: str, **more: Any) -> Any:
    """Defines a flag of a setting that is left to the model by default."""
    return define(name, None, f"{text} (default: the model's).", **more)


NEGATIVE = _left(
    flags.DEFINE_string, "negative_prompt", "What guidance turns away from"
)
SIZE = _left(flags.DEFINE_string, "size", "HEIGHTxWIDTH of the clips in pixels")
FRAMES = _left(
    flags.DEFINE_integer, "frames", "Frames of a clip; 1 is a picture", lower_bound=1
)
FPS = _left(flags.DEFINE_float, "fps", "Frames per second")
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the first prompt's noise; those of the others follow."
)
IMAGE = flags.DEFINE_string("image", None, "Picture that is the first frame.")
LAST = flags.DEFINE_string("last", None, "Picture that is the last frame.")
VIDEO = flags.DEFINE_string(
    "video", None, "Footage to change, or a control signal to follow, such as depth."
)
MASK = flags.DEFINE_string(
    "mask", None, "Picture or video that is white where --video is to change."
)
REFERENCES = flags.DEFINE_list(
    "references", [], "Pictures of what is to appear, with commas between."
)
KEYFRAMES = flags.DEFINE_list(
    "keyframes",
    [],
    "Pictures at their times in seconds, such as 0.5:a.png,1:b.png.",
)
FOOTAGE = (
    flags.DEFINE_string("prefix", None, "Video that the clip goes on from."),
    flags.DEFINE_string("suffix", None, "Video that the clip ends with."),
    flags.DEFINE_string("interpolate", None, "Video to double the frame rate of."),
    flags.DEFINE_string("upscale", None, "Video to double the size of."),
    flags.DEFINE_string("edges", None, "Video whose edges the clip follows."),
    flags.DEFINE_string(
        "guide",
        None,
        "Video of what the clip is to show, and where: depth, pose, segmentation, …, "
        "whichever the model was trained with.",
    ),
    flags.DEFINE_string(
        "restyle", None, "Video to make anew, as the prompt has it; see --strength."
    ),
)
CAMERA = flags.DEFINE_string(
    "camera",
    None,
    "JSON file of the camera's path: a matrix of each frame, and its intrinsics.",
)
STRENGTH = flags.DEFINE_float(
    "strength",
    0.6,
    "How far --restyle goes, 0 to 1: the larger, the less is left of the video.",
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
CARRY = flags.DEFINE_integer(
    "carry",
    None,
    "Latent frames of a window of a film that the one before has made (default: half "
    "of them), or that each chunk of a causal model sees before it.",
    lower_bound=1,
)
SINK = flags.DEFINE_integer(
    "sink",
    0,
    "First latent frames that each chunk of a causal model sees, besides.",
    lower_bound=0,
)
SOUND = flags.DEFINE_boolean(
    "sound", None, "Whether clips have sound (default: yes, if the model can)."
)
FROM_VIDEO = flags.DEFINE_string(
    "from_video", None, "Video to make sound for; the clip keeps its picture."
)
FROM_SOUND = flags.DEFINE_string(
    "from_sound", None, "Sound to make a picture for; the clip keeps it."
)
KEEP_SOUND = flags.DEFINE_list(
    "keep_sound",
    [],
    "Spans in seconds that --from_sound keeps, while the rest of the sound is made: "
    "0:0.5,0.9: keeps the first half second, and all from 0.9 s on.",
)
STEPS = _left(flags.DEFINE_integer, "steps", "Solver steps; fewer are faster")
PRESET = flags.DEFINE_enum(
    "preset",
    None,
    [*PRESETS],
    "Solver, noise levels and guidance of models distilled to few steps.",
)
LEVELS = flags.DEFINE_list(
    "levels",
    None,
    "Noise levels of the steps, falling from 1, such as 1,0.94,0.83,0.63 (default: "
    "spaced as the model's shift has it).",
)
SOLVER = _left(flags.DEFINE_string, "solver", f"Solver, one of {', '.join(SOLVERS)}")
SCALE = _left(
    flags.DEFINE_float,
    "guidance_scale",
    "How strongly to follow the prompt; 1 is without guidance, and twice as fast",
)
SCALE_2 = flags.DEFINE_float(
    "guidance_scale_2",
    None,
    "Guidance scale of the expert for low noise, of models with two experts.",
)
SOUND_SCALE = flags.DEFINE_float(
    "sound_guidance_scale",
    None,
    "Guidance scale of the sound (default: that of the picture).",
)
SYNC = _left(
    flags.DEFINE_float,
    "sync_scale",
    "How strongly the picture is guided to be in step with the sound; 1 is without",
)
SOUND_SYNC = _left(
    flags.DEFINE_float,
    "sound_sync_scale",
    "How strongly the sound is guided to be in step with the picture; 1 is without",
)
CONTROL_SCALE = flags.DEFINE_float(
    "control_guidance_scale",
    1.0,
    "How strongly to follow what is given by channels, --edges, --guide or --camera; "
    "1 is without.",
)
INTERVAL = flags.DEFINE_list(
    "guidance_interval", ["0", "1"], "Noise levels between which to guide."
)
RESCALE = flags.DEFINE_float(
    "guidance_rescale",
    0.0,
    "How far guided clips are brought back to the contrast of unguided ones, 0 to 1.",
)
DRAFT = _left(
    flags.DEFINE_boolean,
    "draft",
    "Draw a picture first, and then the clip that begins with it",
)
AFTER = _left(
    flags.DEFINE_boolean,
    "sound_after",
    "Make the picture first, and then the sound for it",
)
CONDITIONING = flags.DEFINE_list(
    "conditioning_scale",
    ["1"],
    "How strongly --video and --references are followed (VACE): a factor, or one for "
    "each layer that takes hints.",
)
SHIFT = flags.DEFINE_float(
    "shift",
    None,
    "Timestep shift of a released model's noise schedule (default: the folder's own).",
)
for _name, _original in (("num_frames", "frames"), ("num_inference_steps", "steps")):
    flags.DEFINE_alias(_name, _original)
DIT = flags.DEFINE_string(
    "dit", None, "Folder or file of another network for a released model."
)
DIT_LOW = flags.DEFINE_string("dit_low", None, "The same, of the expert for low noise.")
LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "Adapter files (LoRA and its kin), each perhaps with its strength: FILE:0.8,FILE.",
)
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
QUANTIZE = flags.DEFINE_enum(
    "quantize",
    None,
    [*FORMS],
    "Hold the weights of the DiT and of the text encoder in few bits.",
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
    "rows",
    8,
    "Rows that are solved at once; fewer need less memory.",
    lower_bound=1,
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
    start, rest = timed("keep_sound", text, example)
    try:
        return start, float(rest) if rest or ":" not in text else math.inf
    except ValueError:
        raise ValueError(f"--keep_sound (={text!r}) must read {example}.") from None


def common_fields() -> dict[str, Any]:
    """What the flags say of all requests."""
    return size_fields({}, SIZE.value, FRAMES.value, FPS.value) | {
        "negative_prompt": NEGATIVE.value,
        "seed": SEED.value,
        "image": IMAGE.value,
        "last_image": LAST.value,
        "video": VIDEO.value,
        "mask": MASK.value,
        "references": tuple(REFERENCES.value),
        "keyframes": tuple(
            timed("keyframes", x, "SECONDS:PICTURE, such as 0.5:a.png")
            for x in KEYFRAMES.value
        ),
        **{flag.name: flag.value for flag in FOOTAGE},
        "camera": CAMERA.value,
        "sound": SOUND.value,
        "from_video": FROM_VIDEO.value,
        "from_sound": FROM_SOUND.value,
        "keep_sound": tuple(map(_span, KEEP_SOUND.value)),
    }


def sampling_settings() -> Settings:
    """What the flags say of sampling."""
    if SHIFT.value is not None and (PRESET.value or LEVELS.value):
        raise ValueError("--shift spaces noise levels that --preset or --levels give.")
    named = STEPS, PRESET, SOLVER, SCALE, SCALE_2, RESCALE, DRAFT
    named += SOUND_SCALE, SYNC, SOUND_SYNC, AFTER, STRENGTH, CONTROL_SCALE
    low, high = map(float, INTERVAL.value)
    return Settings(
        guidance_interval=(low, high),
        conditioning_scale=tuple(map(float, CONDITIONING.value)),
        levels=LEVELS.value and tuple(map(float, LEVELS.value)),
        **{flag.name: flag.value for flag in named},
    )


def told_settings(settings: Settings, model: Bundle) -> dict[str, Any]:
    """What a clip's file says of how it was made, besides its request."""
    told = {k: x for k, x in dataclasses.asdict(settings).items() if x is not None}
    if settings.levels is None:
        told["shift"] = model.policy.shift
    if not model.boundary:
        told.pop("guidance_scale_2", None)
    if not model.dit.cond_channels:
        told.pop(CONTROL_SCALE.name)
    if not model.dit.control_channels:
        told.pop("conditioning_scale")
    if not model.has_sound:
        for flag in (SOUND_SCALE, SYNC, SOUND_SYNC, AFTER):
            told.pop(flag.name, None)
    files = WORKDIR, PRETRAINED, DIT, DIT_LOW, LORA, LORA_HIGH, LORA_LOW, REUSE
    files += (QUANTIZE,)
    return told | {flag.name: flag.value for flag in files if flag.value}
