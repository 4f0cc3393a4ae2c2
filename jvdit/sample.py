"""Generates clips: `python -m jvdit.sample "a large red rubber circle …" --workdir …`.

With `--pretrained FOLDER` from a released Wan 2 model, as its authors recommend. Writes
an mp4 for each prompt, with its settings and seed in the file, and one PNG sheet of all
of them.
"""

import dataclasses
import pathlib
import re
import sys
from typing import Any

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress

from jvdit.compilation import keep_compilations
from jvdit.data.media_encode import encode_clip
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.diffusion.denoise import Guidance
from jvdit.diffusion.reuse import Reuse, save_ratios
from jvdit.diffusion.solvers import SOLVERS
from jvdit.generation.draft import generate
from jvdit.generation.generator import Generator
from jvdit.generation.prompt_lines import read_requests
from jvdit.generation.release import EXPERTS, add_adapters, load_release
from jvdit.generation.request import Request, size_fields
from jvdit.huge_pages import use_huge_pages
from jvdit.sharding import make_mesh, parse_mesh, sampling_sizes

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a training, or its model folder.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "File: a prompt a line, or JSON lines with fields of a request."
)
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "Folder of a released model, instead of --workdir."
)
_DIT = flags.DEFINE_string("dit", None, "Finetuned network for a released model.")
_DIT_LOW = flags.DEFINE_string("dit_low", None, "The same, of the low-noise expert.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Of a released model."
)
_SHIFT = flags.DEFINE_float(
    "shift", None, "Timestep shift of a released model (default: the folder's own)."
)
_REUSE = flags.DEFINE_string(
    "reuse", None, "File of --calibrate: reuse what the network's blocks add, faster."
)
_THRESHOLD = flags.DEFINE_float("reuse_threshold", 0.06, "Higher: faster, rougher.")
_CALIBRATE = flags.DEFINE_string(
    "calibrate", None, "Measure for --reuse on the first prompt, into this file."
)
_LORA = flags.DEFINE_list(
    "lora", [], "Files of adapters, each perhaps with its strength: FILE:0.8,FILE."
)
_LORA_HIGH = flags.DEFINE_list("lora_high", [], "The same, of one expert alone.")
_LORA_LOW = flags.DEFINE_list("lora_low", [], "The same, of the low-noise expert.")
_IMAGE = flags.DEFINE_string("image", None, "Picture: the first frame.")
_LAST = flags.DEFINE_string("last", None, "Picture: the last frame.")
_VIDEO = flags.DEFINE_string("video", None, "Footage or control signal to follow.")
_MASK = flags.DEFINE_string("mask", None, "White where to change --video.")
_REFERENCES = flags.DEFINE_list("references", [], "Pictures of what is to appear.")
_OUT = flags.DEFINE_string("out", "samples", "Folder of the clips.")
_NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What to turn away from.")
_SIZE = flags.DEFINE_string("size", None, "HEIGHTxWIDTH in pixels.")
_FRAMES = flags.DEFINE_integer("frames", None, "Frames of a clip.", lower_bound=1)
_FPS = flags.DEFINE_float("fps", None, "Frames per second.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first prompt; the others follow.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of the solver.")
_SOLVER = flags.DEFINE_string("solver", None, f"One of {', '.join(SOLVERS)}.")
_SCALE = flags.DEFINE_float("guidance_scale", None, "1: as trained, faster.")
_SCALE_2 = flags.DEFINE_float("guidance_scale_2", None, "Of the low-noise expert.")
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", ["0", "1"], "Times to guide between."
)
_RESCALE = flags.DEFINE_float("guidance_rescale", 0.0, "0 to 1.")
_DRAFT = flags.DEFINE_boolean(
    "draft", None, "Generate twice, the second time from the first one's first frame."
)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows solved at once; fewer need less memory.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices along axes: data=2,context=4. Default: as rows are many."
)


def file_name(request: Request) -> str:
    """A readable name: the prompt's first words and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")
    return f"{words[:60].rstrip('-') or 'empty'}_{request.seed}.mp4"


def _request_defaults(generator: Generator) -> dict[str, Any]:
    model = generator.defaults
    fields = size_fields(model, _SIZE.value, _FRAMES.value, _FPS.value)
    return fields | {
        "negative_prompt": _given(_NEGATIVE, model, ""),
        "seed": _SEED.value,
        "image": _IMAGE.value,
        "last_image": _LAST.value,
        "video": _VIDEO.value,
        "mask": _MASK.value,
        "references": tuple(_REFERENCES.value),
    }


def _mesh(prompts: int) -> Mesh:
    """A row to a device; what is left over divides the tokens of each."""
    if _MESH.value is not None:
        return make_mesh(parse_mesh(_MESH.value))
    # Where one expert isn't guided, the other's pairs of rows follow one another.
    guided = 1 not in (_SCALE.value, _SCALE_2.value)
    rows = min(prompts, _ROWS.value) * (2 if guided else 1)
    return make_mesh(sampling_sizes(rows, jax.device_count()))


def _load(mesh: Mesh) -> Generator:
    if (_WORKDIR.value is None) == (_PRETRAINED.value is None):
        raise ValueError("give one of --workdir and --pretrained.")
    if _PRETRAINED.value is None:
        for flag in (_DIT, _DIT_LOW, _SHIFT):
            if flag.value is not None:
                raise ValueError(f"--{flag.name} goes with --pretrained.")
        generator = Generator.load(_WORKDIR.value, mesh)
    else:
        networks = {"dit": _DIT.value, "dit_low": _DIT_LOW.value}
        generator = load_release(
            _PRETRAINED.value,
            mesh,
            dtype=_DTYPE.value,
            shift=_SHIFT.value,
            parts={name: path for name, path in networks.items() if path},
        )
    for flag, networks in (
        (_LORA, EXPERTS),
        (_LORA_HIGH, EXPERTS[:1]),
        (_LORA_LOW, EXPERTS[1:]),
    ):
        files = [_strength(text) for text in flag.value]
        add_adapters(generator, files, networks)
    if _SCALE_2.value is not None and not generator.boundary:
        raise ValueError("--guidance_scale_2 is for models of two experts.")
    return generator


def _strength(text: str) -> tuple[str, float]:
    """FILE or FILE:FACTOR."""
    match = re.fullmatch(r"(.+):(-?[\d.]+)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def _given(flag: Any, defaults: dict[str, Any], fallback: Any) -> Any:
    return flag.value if flag.value is not None else defaults.get(flag.name, fallback)


def sample(prompts: list[str]) -> list[pathlib.Path]:
    """Generates and writes what the flags and prompts ask for; returns the files."""
    if not prompts:
        raise ValueError('give a prompt, "…", or --prompts=FILE.')
    generator = _load(_mesh(len(prompts)))
    defaults = generator.defaults
    unit = 0 if _SIZE.value else generator.unit
    requests = read_requests(prompts, _request_defaults(generator), unit)
    steps = _given(_STEPS, defaults, 30)
    solver = _given(_SOLVER, defaults, "unipc")
    scale = _given(_SCALE, defaults, 4.0)
    draft = _given(_DRAFT, defaults, False)
    low, high = (float(x) for x in _INTERVAL.value)
    guidance = Guidance(scale, (low, high), _RESCALE.value)
    scale_2 = scale if _SCALE.value is not None else defaults.get(_SCALE_2.name, scale)
    scale_2 = scale_2 if _SCALE_2.value is None else _SCALE_2.value
    settings = {
        "steps": steps,
        "solver": solver,
        "guidance": guidance,
        "low_guidance": dataclasses.replace(guidance, scale=scale_2),
    }
    if _CALIBRATE.value:
        save_ratios(_CALIBRATE.value, generator.calibrate(requests[0], **settings))
        return [pathlib.Path(_CALIBRATE.value)]
    if _REUSE.value:
        settings["reuse"] = Reuse.load(_REUSE.value, _THRESHOLD.value)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=None)

        def on_step(done: int, total: int, latents: Any) -> None:
            progress.update(task, description="denoising", total=total, completed=done)

        settings |= {"rows": _ROWS.value, "on_step": on_step}
        videos = generate(generator, requests, draft=draft, **settings)
    told = {"steps": steps, "solver": solver, "draft": draft}
    told |= dataclasses.asdict(guidance)
    if generator.boundary:
        told["scale_2"] = scale_2
    flags_told = (_PRETRAINED, _DIT, _DIT_LOW, _LORA, _LORA_HIGH, _LORA_LOW, _REUSE)
    told |= {flag.name: flag.value for flag in flags_told if flag.value}
    told["shift"] = generator.policy.shift
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for request, video in zip(requests, videos, strict=True):
        path = folder / file_name(request)
        metadata = {"jvdit": request.settings | told}
        encode_clip(path, video, request.fps, metadata=metadata)
        files.append(path)
    sheet = contact_sheet(videos, [request.prompt for request in requests])
    write_png(folder / "sheet.png", sheet)
    return [*files, folder / "sheet.png"]


def main(argv: list[str]) -> None:
    """Parses, generates, and turns mistakes of the user into one line."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    prompts = argv[1:]
    try:
        keep_compilations()
        if _PROMPTS.value is not None:
            lines = pathlib.Path(_PROMPTS.value).read_text().splitlines()
            prompts += [line for line in lines if line.strip()]
        for path in sample(prompts):
            print(path)
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (ValueError, OSError) as error:
        if flags.FLAGS["verbosity"].present:
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
