"""Generates clips: `python -m jvdit.sample "one object: a large red circle …"`.

The small model in the box generates them; with `--workdir` one of your own, with
`--pretrained` a released Wan 2 model as its authors recommend. Each clip is written as
an mp4 as soon as it is ready, with its settings and seed in the file; a PNG sheet shows
them all.
"""

from jvdit.machine.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # begins this process anew, so before what takes seconds


import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from jvdit.box import FOLDER
from jvdit.data.sheets import contact_sheet, write_png
from jvdit.diffusion.reuse import Reuse, save_ratios
from jvdit.diffusion.solvers import SOLVERS
from jvdit.generation.calibration import calibrate
from jvdit.generation.cascade import check_stage, refine
from jvdit.generation.film_file import write_film
from jvdit.generation.films import Film, Scene, check_film
from jvdit.generation.generator import Generator
from jvdit.generation.presets import PRESETS
from jvdit.generation.prompt_lines import read_prompts, read_request
from jvdit.generation.request import Request, size_fields
from jvdit.generation.results import viewing_scale
from jvdit.generation.settings import Settings
from jvdit.machine import flag_parser
from jvdit.machine.command import told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.machine.files import check_writable
from jvdit.machine.progress import Bars
from jvdit.sharding import make_mesh, parse_mesh, sampling_sizes
from jvdit.weights.adapter_report import report_adapters
from jvdit.weights.adapters import strengths
from jvdit.weights.bundle import Bundle
from jvdit.weights.opening import EXPERTS, open_bundle, with_adapters

_LETTERS, _BYTES = 80, 160  # of a prompt in a file's name, at the most

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of a training run, or of its finished model (default: the small model in "
    "the box).",
)
_PRETRAINED = flags.DEFINE_string(
    "pretrained",
    None,
    "Folder of a released Wan 2 model, or its id on the Hugging Face Hub, instead of "
    "--workdir.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "File with a prompt a line, or with JSON lines that hold fields of a Request.",
)
_OUT = flags.DEFINE_string("out", "samples", "Folder that the clips are written to.")


def _left(define: Callable[..., Any], name: str, text: str, **more: Any) -> Any:
    """Defines a flag of a setting that is left to the model by default."""
    return define(name, None, f"{text} (default: the model's).", **more)


_NEGATIVE = _left(
    flags.DEFINE_string, "negative_prompt", "What guidance turns away from"
)
_SIZE = _left(flags.DEFINE_string, "size", "HEIGHTxWIDTH of the clips in pixels")
_FRAMES = _left(
    flags.DEFINE_integer, "frames", "Frames of a clip; 1 is a picture", lower_bound=1
)
_FPS = _left(flags.DEFINE_float, "fps", "Frames per second")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the first prompt's noise; those of the others follow."
)
_IMAGE = flags.DEFINE_string("image", None, "Picture that is the first frame.")
_LAST = flags.DEFINE_string("last", None, "Picture that is the last frame.")
_VIDEO = flags.DEFINE_string(
    "video", None, "Footage to change, or a control signal to follow, such as depth."
)
_MASK = flags.DEFINE_string(
    "mask", None, "Video that is white where --video is to change."
)
_REFERENCES = flags.DEFINE_list(
    "references", [], "Pictures of what is to appear, with commas between."
)
_KEYFRAMES = flags.DEFINE_list(
    "keyframes",
    [],
    "Pictures at their times in seconds, such as 0.5:a.png,1:b.png.",
)
_FOOTAGE = (
    flags.DEFINE_string("prefix", None, "Video that the clip goes on from."),
    flags.DEFINE_string("suffix", None, "Video that the clip ends with."),
    flags.DEFINE_string("interpolate", None, "Video to double the frame rate of."),
    flags.DEFINE_string("upscale", None, "Video to double the size of."),
    flags.DEFINE_string("edges", None, "Video whose edges the clip follows."),
    flags.DEFINE_string(
        "restyle", None, "Video to make anew, as the prompt has it; see --strength."
    ),
)
_STRENGTH = flags.DEFINE_float(
    "strength",
    0.6,
    "How far --restyle goes, 0 to 1: the larger, the less is left of the video.",
)
_CASCADE = flags.DEFINE_list(
    "cascade",
    [],
    "What to do with each clip then: interpolate, upscale, or both, each perhaps with "
    "a model of its own: upscale=WORKDIR.",
)
_SECONDS = flags.DEFINE_float(
    "seconds",
    None,
    "Make a film that lasts so long, window after window of --frames.",
    lower_bound=0.0,
)
_EXTEND = flags.DEFINE_string(
    "extend", None, "Video of any length that the film goes on from."
)
_SCENE = flags.DEFINE_multi_string(
    "scene",
    [],
    "A scene of the film, as SECONDS:PROMPT; until the first, the prompt itself holds.",
)
_CARRY = flags.DEFINE_integer(
    "carry",
    None,
    "Latent frames of a window that the one before has made (default: half of them).",
    lower_bound=1,
)
_SOUND = flags.DEFINE_boolean(
    "sound", None, "Whether clips have sound (default: yes, if the model can)."
)
_FROM_VIDEO = flags.DEFINE_string(
    "from_video", None, "Video to make sound for; the clip keeps its picture."
)
_FROM_SOUND = flags.DEFINE_string(
    "from_sound", None, "Sound to make a picture for; the clip keeps it."
)
_STEPS = _left(flags.DEFINE_integer, "steps", "Solver steps; fewer are faster")
_PRESET = flags.DEFINE_enum(
    "preset",
    None,
    [*PRESETS],
    "Solver, noise levels and guidance of models distilled to few steps.",
)
_LEVELS = flags.DEFINE_list(
    "levels",
    None,
    "Noise levels of the steps, falling from 1, such as 1,0.94,0.83,0.63 (default: "
    "spaced as the model's shift has it).",
)
_SOLVER = _left(flags.DEFINE_string, "solver", f"Solver, one of {', '.join(SOLVERS)}")
_SCALE = _left(
    flags.DEFINE_float,
    "guidance_scale",
    "How strongly to follow the prompt; 1 is without guidance, and twice as fast",
)
_SCALE_2 = flags.DEFINE_float(
    "guidance_scale_2",
    None,
    "Guidance scale of the expert for low noise, of models with two experts.",
)
_SOUND_SCALE = flags.DEFINE_float(
    "sound_guidance_scale",
    None,
    "Guidance scale of the sound (default: that of the picture).",
)
_SYNC = _left(
    flags.DEFINE_float,
    "sync_scale",
    "How strongly the picture is guided to be in step with the sound; 1 is without",
)
_SOUND_SYNC = _left(
    flags.DEFINE_float,
    "sound_sync_scale",
    "How strongly the sound is guided to be in step with the picture; 1 is without",
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", ["0", "1"], "Noise levels between which to guide."
)
_RESCALE = flags.DEFINE_float(
    "guidance_rescale",
    0.0,
    "How far guided clips are brought back to the contrast of unguided ones, 0 to 1.",
)
_DRAFT = _left(
    flags.DEFINE_boolean,
    "draft",
    "Draw a picture first, and then the clip that begins with it",
)
_AFTER = _left(
    flags.DEFINE_boolean,
    "sound_after",
    "Make the picture first, and then the sound for it",
)
_CONDITIONING = flags.DEFINE_list(
    "conditioning_scale",
    ["1"],
    "How strongly --video and --references are followed (VACE): a factor, or one for "
    "each layer that takes hints.",
)
_SHIFT = flags.DEFINE_float(
    "shift",
    None,
    "Timestep shift of a released model's noise schedule (default: the folder's own).",
)
for _name, _original in (("num_frames", "frames"), ("num_inference_steps", "steps")):
    flags.DEFINE_alias(_name, _original)
_DIT = flags.DEFINE_string(
    "dit", None, "Folder or file of another network for a released model."
)
_DIT_LOW = flags.DEFINE_string(
    "dit_low", None, "The same, of the expert for low noise."
)
_LORA = flags.DEFINE_multi_string(
    "lora",
    [],
    "Adapter files (LoRA and its kin), each perhaps with its strength: FILE:0.8,FILE.",
)
_LORA_HIGH = flags.DEFINE_multi_string(
    "lora_high", [], "Adapter files for the expert for high noise alone."
)
_LORA_LOW = flags.DEFINE_multi_string(
    "lora_low", [], "Adapter files for the expert for low noise alone."
)
_CHECK_LORA = flags.DEFINE_string(
    "check_lora",
    None,
    "Adapter file: say what of it the model reads, and generate nothing.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Precision of a released model's weights and computation.",
)
_VARIANT = flags.DEFINE_string(
    "variant", "", "Version of a released model's weights, such as fp16."
)
_CALIBRATE = flags.DEFINE_string(
    "calibrate",
    None,
    "File to write: how the network's output changes from step to step, measured on "
    "the first prompt, for --reuse.",
)
_REUSE = flags.DEFINE_string(
    "reuse", None, "File of --calibrate: skip blocks where little changes (MagCache)."
)
_THRESHOLD = flags.DEFINE_float(
    "reuse_threshold",
    0.06,
    "Error that --reuse may make; higher is faster, rougher.",
    lower_bound=0.0,
)
_ROWS = flags.DEFINE_integer(
    "rows",
    8,
    "Rows that are solved at once; fewer need less memory.",
    lower_bound=1,
)
_ENLARGED = flags.DEFINE_integer(
    "scale",
    None,
    "How many times to enlarge clips in their files, by whole pixels (default: until "
    "the short side has 256 pixels).",
    lower_bound=1,
)
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices along each axis, such as data=2,context=4 (default: a row to a device, "
    "and what is left over shares the tokens of each row).",
)


def clip_name(request: Request) -> str:
    """A readable name: the prompt's first words, in any script, and the seed."""
    words = re.sub(r"[\W_]+", "-", request.prompt.lower()).strip("-")
    words = words[:_LETTERS].encode()[:_BYTES].decode(errors="ignore").rstrip("-")
    return f"{words or 'clip'}_{request.seed}"


def free_path(folder: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
    """A path in the folder at which nothing lies: the name, or it with a number."""
    numbered = (f"{name}-{number}{suffix}" for number in itertools.count(2))
    paths = (folder / each for each in itertools.chain([name + suffix], numbered))
    return next(path for path in paths if not path.exists())


def _timed(flag: str, text: str, example: str) -> tuple[float, str]:
    """Seconds, and what follows the colon, of an entry of a flag."""
    time, _, what = text.partition(":")
    try:
        return float(time), what
    except ValueError:
        raise ValueError(f"--{flag} (={text!r}) must read {example}.") from None


def _common_fields() -> dict[str, Any]:
    """What the flags say of all requests."""
    return size_fields({}, _SIZE.value, _FRAMES.value, _FPS.value) | {
        "negative_prompt": _NEGATIVE.value,
        "seed": _SEED.value,
        "image": _IMAGE.value,
        "last_image": _LAST.value,
        "video": _VIDEO.value,
        "mask": _MASK.value,
        "references": tuple(_REFERENCES.value),
        "keyframes": tuple(
            _timed("keyframes", x, "SECONDS:PICTURE, such as 0.5:a.png")
            for x in _KEYFRAMES.value
        ),
        **{flag.name: flag.value for flag in _FOOTAGE},
        "sound": _SOUND.value,
        "from_video": _FROM_VIDEO.value,
        "from_sound": _FROM_SOUND.value,
    }


def _mesh(prompts: int) -> Mesh:
    """A row to a device; what is left over divides the tokens of each."""
    if _MESH.value is not None:
        return make_mesh(parse_mesh(_MESH.value))
    # Where one expert isn't guided, the other's pairs of rows follow one another.
    guided = 1 not in (_SCALE.value, _SCALE_2.value) and not _PRESET.value
    rows = min(prompts, _ROWS.value) * (2 if guided else 1)
    return make_mesh(sampling_sizes(rows, jax.device_count()))


def _load(mesh: Mesh) -> Generator:
    model = _open(mesh)
    adapters = (_LORA, EXPERTS), (_LORA_HIGH, EXPERTS[:1]), (_LORA_LOW, EXPERTS[1:])
    for flag, networks in adapters:
        if files := strengths(flag.value):
            model = with_adapters(model, files, networks)
    if _SCALE_2.value is not None and not model.boundary:
        raise ValueError("--guidance_scale_2 is for models of two experts.")
    return Generator(model, mesh)


def _open(mesh: Mesh) -> Bundle:
    if _WORKDIR.value is not None and _PRETRAINED.value is not None:
        raise ValueError("give one of --workdir and --pretrained, not both.")
    if _PRETRAINED.value is None:
        for flag in (_DIT, _DIT_LOW, _SHIFT, _VARIANT):
            if flag.value:
                raise ValueError(f"--{flag.name} goes with --pretrained.")
        # An absolute path, which is no id on the hub.
        return open_bundle(pathlib.Path(_WORKDIR.value or FOLDER).absolute(), mesh)
    return open_bundle(
        _PRETRAINED.value,
        mesh,
        dtype=_DTYPE.value,
        shift=_SHIFT.value,
        parts={x.name: x.value for x in (_DIT, _DIT_LOW) if x.value},
        variant=_VARIANT.value,
    )


def _sifted(
    items: Sequence[tuple[str, Any]], change: Callable[[str, Any], Any]
) -> tuple[list[tuple[str, Any]], list[str]]:
    """Changes each item, and leaves out those of which that raises an error.

    Args:
        items: the place of each, for error messages, and it.
        change: function of the two.

    Returns:
        The changed items with their places, and why the others were left out.

    Raises:
        ValueError: none is left.
        OSError: the same, for want of a file.
    """
    kept, refused = [], []
    for where, item in items:
        try:
            kept.append((where, change(where, item)))
        except (ValueError, OSError) as error:
            if len(refused) + 1 == len(items):
                raise
            told = str(error)
            refused.append(told if where in told else f"{where}: {told}")
            print(f"left out: {refused[-1]}", file=sys.stderr)
    return kept, refused


def _parsed(prompts: Sequence[tuple[str, str]]) -> tuple[list[Any], list[str]]:
    """Requests with their places, and why others were left out; see `_sifted`."""
    common, seeds = _common_fields(), itertools.count(_SEED.value)

    def parse(where: str, line: str) -> Request:
        return read_request(line, where, common | {"seed": next(seeds)})

    return _sifted(prompts, parse)


def _checked(generator: Generator, request: Request) -> Request:
    """A complete request that can be generated, its files read once."""
    request = generator.complete(request)
    generator.check(request)
    request.read_given()
    return request


def _settings() -> Settings:
    """What the flags say of sampling."""
    if _SHIFT.value is not None and (_PRESET.value or _LEVELS.value):
        raise ValueError("--shift spaces noise levels that --preset or --levels give.")
    named = _STEPS, _PRESET, _SOLVER, _SCALE, _SCALE_2, _RESCALE, _DRAFT
    named += _SOUND_SCALE, _SYNC, _SOUND_SYNC, _AFTER, _STRENGTH
    low, high = map(float, _INTERVAL.value)
    return Settings(
        guidance_interval=(low, high),
        conditioning_scale=tuple(map(float, _CONDITIONING.value)),
        levels=_LEVELS.value and tuple(map(float, _LEVELS.value)),
        **{flag.name: flag.value for flag in named},
    )


def _told(settings: Settings, model: Bundle) -> dict[str, Any]:
    """What a clip's file says of how it was made, besides its request."""
    told = {k: x for k, x in dataclasses.asdict(settings).items() if x is not None}
    if settings.levels is None:
        told["shift"] = model.policy.shift
    if not model.boundary:
        told.pop("guidance_scale_2", None)
    if not model.dit.control_channels:
        told.pop("conditioning_scale")
    if not model.has_sound:
        for flag in (_SOUND_SCALE, _SYNC, _SOUND_SYNC, _AFTER):
            told.pop(flag.name, None)
    files = _WORKDIR, _PRETRAINED, _DIT, _DIT_LOW, _LORA, _LORA_HIGH, _LORA_LOW, _REUSE
    return told | {flag.name: flag.value for flag in files if flag.value}


@dataclasses.dataclass(frozen=True)
class _Written:
    """A file that was written, and what a sheet shows of it.

    Attributes:
        path: of the file.
        prompt: of the clip.
        video: its frames, or some of them.
        spectrogram: of its sound, if it has some.
    """

    path: pathlib.Path
    prompt: str
    video: np.ndarray
    spectrogram: np.ndarray | None = None


def sample(prompts: Sequence[tuple[str, str]]) -> Iterator[pathlib.Path]:
    """Generates what the flags and prompts ask for; yields each file once it is there.

    What was generated is shown on a sheet even if the rest never comes.

    Args:
        prompts: the place of each, for error messages, and it.

    Raises:
        ValueError: a setting is wrong, or a prompt was left out; the others are done.
    """
    if not prompts:
        raise ValueError('give a prompt, "…", or --prompts=FILE.')
    parsed, refused = _parsed(prompts)
    settings, folder = _settings(), pathlib.Path(_OUT.value)
    if not _CALIBRATE.value:
        check_writable(folder)  # before anything is computed
    generator = _load(_mesh(len(prompts)))
    films = bool(_SECONDS.value or _EXTEND.value or _SCENE.value)
    check = partial(_film, generator) if films else partial(_checked, generator)
    checked, more = _sifted(parsed, lambda _, request: check(request))
    requests, refused = [request for _, request in checked], refused + more
    settings = settings.complete(generator.model.defaults)
    if _CALIBRATE.value:
        ratios = calibrate(generator, requests[0], **settings.solving)
        save_ratios(_CALIBRATE.value, ratios)
        yield pathlib.Path(_CALIBRATE.value)
        return
    shown: list[_Written] = []
    try:
        for one in (_films if films else _clips)(generator, requests, settings):
            shown.append(one)
            yield one.path
    finally:
        if shown:
            sheet = contact_sheet(
                [x.video for x in shown],
                [x.prompt for x in shown],
                sounds=[x.spectrogram for x in shown],
            )
            write_png(path := free_path(folder, "sheet", ".png"), sheet)
    yield path
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(prompts)} prompts were left out, the first: "
            f"{refused[0]}"
        )


def _clips(
    generator: Generator, requests: Sequence[Request], settings: Settings
) -> Iterator[_Written]:
    """Generates clips and writes each."""
    reuse = Reuse.load(_REUSE.value, _THRESHOLD.value) if _REUSE.value else None
    told, stages = _told(settings, generator.model), _stages(generator)
    with _Shown(len(requests)) as watch:
        made = generator.clips(
            requests, settings, rows=_ROWS.value, watch=watch, reuse=reuse
        )
        for done, (i, clip) in enumerate(made, 1):
            request = requests[i]
            for stage, by in stages:
                request, clip = refine(by, stage, request, clip, settings, watch=watch)
            path = free_path(pathlib.Path(_OUT.value), clip_name(request), ".mp4")
            scale = _ENLARGED.value or clip.viewing_scale
            about = request.settings | told
            if stages:
                about |= {"cascade": _CASCADE.value}
            clip.save(path, {"jvdit": about}, scale)
            watch.clips(done)
            yield _Written(path, request.prompt, clip.video, clip.spectrogram)


def _stages(generator: Generator) -> list[tuple[str, Generator]]:
    """The stages of --cascade, each with its generator."""
    found = []
    for text in _CASCADE.value:
        stage, _, folder = text.partition("=")
        by = generator
        if folder:
            by = Generator.load(pathlib.Path(folder).absolute(), generator.mesh)
        check_stage(by, stage)
        found.append((stage, by))
    return found


def _film(generator: Generator, request: Request) -> Film:
    """The film that a request and the flags ask for, complete and possible."""
    request = generator.complete(request)
    request.read_given()
    fps = float(request.fps or 1.0)
    frames = round((_SECONDS.value or 0.0) * fps)
    if frames < 1:
        raise ValueError("--seconds says how long the film lasts; give it.")
    example = "SECONDS:PROMPT"
    scenes = [Scene(*_timed("scene", text, example)) for text in _SCENE.value]
    film = Film(request, frames, _EXTEND.value, scenes, _CARRY.value)
    return check_film(generator, film)


def _films(
    generator: Generator, films: Sequence[Film], settings: Settings
) -> Iterator[_Written]:
    """Makes films, and writes each while it is being made."""
    told = _told(settings, generator.model)
    for film in films:
        request = film.request
        path = free_path(pathlib.Path(_OUT.value), clip_name(request), ".mp4")
        more = {"frames": film.frames, "carry": film.carry, "extend": _EXTEND.value}
        more["scenes"] = [list(scene) for scene in film.scenes]
        with Bars() as bars:
            task = bars.add_task("frames", total=film.frames)
            stills = write_film(
                path,
                generator,
                film,
                settings,
                metadata={"jvdit": request.settings | told | more},
                scale=_ENLARGED.value or viewing_scale(request.size[1:]),
                on_frames=lambda done, task=task: bars.update(task, completed=done),
                tell=bars.print,
            )
        yield _Written(path, request.prompt, stills)


class _Shown(Bars):
    """Bars of the clips that are ready, and of what is done at the moment."""

    def __init__(self, count: int):
        super().__init__()
        self._clips = self.add_task("clips", total=count)
        self._now = self.add_task("compiling", total=None)

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Shows how many steps or frames are done."""
        self.update(self._now, description=doing, total=total, completed=done)

    def clips(self, done: int) -> None:
        """Shows how many clips are ready."""
        self.update(self._clips, completed=done)


def main(argv: list[str]) -> None:
    """Parses, generates, and turns mistakes of the user into one line."""
    prompts = [(f"prompt {i}", line) for i, line in enumerate(argv[1:], 1)]
    with told_in_a_line("stopped; the clips that were ready are written."):
        keep_compilations()
        if _CHECK_LORA.value is not None:
            model = _open(make_mesh(devices=jax.devices()[:1]))
            print(report_adapters(model, _CHECK_LORA.value))
            return
        if _PROMPTS.value is not None:
            prompts += read_prompts(_PROMPTS.value)
        for path in sample(prompts):
            print(path)


if __name__ == "__main__":
    flag_parser.run(main)
