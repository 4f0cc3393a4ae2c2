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
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from jvdit.data.sheets import contact_sheet, png
from jvdit.diffusion.reuse import Reuse, save_ratios
from jvdit.generation import sample_flags as asked
from jvdit.generation import shared_flags
from jvdit.generation.calibration import calibrate
from jvdit.generation.cascade import check_stage, refine
from jvdit.generation.film_file import write_film
from jvdit.generation.films import Film, Scene, check_film
from jvdit.generation.following import Followed, complete_window
from jvdit.generation.generator import Generator
from jvdit.generation.prompt_lines import read_prompts, read_request
from jvdit.generation.request import Request
from jvdit.generation.results import STATEMENT, viewing_scale
from jvdit.generation.settings import Settings
from jvdit.generation.shared_flags import check_markable, provenance, watermark
from jvdit.machine import flag_parser
from jvdit.machine.command import told_in_a_line
from jvdit.machine.compilation import keep_compilations
from jvdit.machine.energy import Energy, Meter, Shares
from jvdit.machine.files import check_writable, write_atomically
from jvdit.machine.progress import Bars
from jvdit.sharding import make_mesh
from jvdit.weights.adapter_report import report_adapters
from jvdit.weights.starting import model_hash

if TYPE_CHECKING:
    from jvdit.generation.provenance import Provenance

flags.adopt_module_key_flags(asked)
flags.adopt_module_key_flags(shared_flags)

_LETTERS, _BYTES = 80, 160  # of a prompt in a file's name, at the most


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
    common, seeds = asked.common_fields(), itertools.count(asked.REQUEST["seed"].value)

    def parse(where: str, line: str) -> Request:
        return read_request(line, where, common | {"seed": next(seeds)})

    return _sifted(prompts, parse)


def _checked(generator: Generator, request: Request) -> Request:
    """A complete request that can be generated, its files read once."""
    request = generator.complete(request)
    generator.check(request)
    request.read_given()
    return request


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
    mark = watermark()
    signed, (parsed, refused) = provenance(), _parsed(prompts)
    settings, folder = asked.sampling_settings(), pathlib.Path(asked.OUT.value)
    if not asked.CALIBRATE.value:
        check_writable(folder)  # before anything is computed
    generator = asked.named_generator(asked.named_mesh(len(prompts)))
    films = bool(asked.SECONDS.value or asked.EXTEND.value or asked.SCENE.value)
    check = partial(_film, generator) if films else partial(_checked, generator)
    checked, more = _sifted(parsed, lambda _, request: check(request))
    requests, refused = [request for _, request in checked], refused + more
    settings = settings.complete(generator.model.defaults)
    if asked.CALIBRATE.value:
        ratios = calibrate(generator, requests[0], **settings.solving)
        save_ratios(asked.CALIBRATE.value, ratios)
        yield pathlib.Path(asked.CALIBRATE.value)
        return
    told = asked.told_settings(settings, generator.model)
    if mark is not None:
        _check_markable(settings, films, requests)
        generator.watermark, told["watermark"] = mark, "gaussian shading"
    signed = signed and signed.of(model_hash(generator.model))
    how, shown = (generator, settings, told, signed), list[_Written]()
    made = map(partial(_filmed, *how), requests) if films else _clips(requests, *how)
    try:
        for one in made:
            shown.append(one)
            yield one.path
    finally:
        if shown:
            sheet = contact_sheet(
                [x.video for x in shown],
                [x.prompt for x in shown],
                sounds=[x.spectrogram for x in shown],
            )
            path = free_path(folder, "sheet", ".png")
            data = png(sheet, {"Description": STATEMENT, "Comment": json.dumps(told)})
            write_atomically(path, signed.signed(data, told) if signed else data)
    yield path
    if refused:
        raise ValueError(
            f"{len(refused)} of {len(prompts)} prompts were left out, the first: "
            f"{refused[0]}"
        )


def _check_markable(settings: Settings, films: bool, requests: Sequence[Any]) -> None:
    """Raises a ValueError if the noise of what is asked for can't be found again."""
    restyled = not films and any(x.restyle is not None for x in requests)
    for given, what in (
        (films, "films, which are made window after window"),
        (asked.CASCADE.value, "--cascade, whose stages change what was marked"),
        (restyled, "--restyle, which begins with footage"),
    ):
        if given:
            raise ValueError(f"--watermark doesn't go with {what}; leave one out.")
    check_markable(settings.solver)


def _clips(
    requests: Sequence[Request],
    generator: Generator,
    settings: Settings,
    told: dict[str, Any],
    signed: "Provenance | None",
) -> Iterator[_Written]:
    """Generates clips and writes each.

    Args:
        requests: complete.
        generator: of the model.
        settings: complete.
        told: what the files say of them.
        signed: signs the files.
    """
    file = asked.REUSE.value
    reuse = file and Reuse.load(file, asked.THRESHOLD.value)
    stages = _stages(generator)
    shares = Shares(meter := Meter())
    with _Shown(len(requests)) as watch:
        made = generator.clips(
            requests, settings, rows=asked.ROWS.value, watch=watch, reuse=reuse
        )
        for done, (i, clip) in enumerate(made, 1):
            request, energy = requests[i], shares.next(clip.together)
            for stage, by in stages:
                request, clip = refine(by, stage, request, clip, settings, watch=watch)
                energy += meter.lap()
            path = free_path(pathlib.Path(asked.OUT.value), clip_name(request), ".mp4")
            scale = asked.ENLARGED.value or clip.viewing_scale
            about = request.settings | told | {"energy": energy.told}
            if stages:
                about |= {"cascade": asked.CASCADE.value}
            sign = signed and signed.signing(about, requests[i])
            clip.save(path, {"jvdit": about}, scale, sign)
            watch.clips(done, meter.total * (1 / done))
            yield _Written(path, request.prompt, clip.video, clip.spectrogram)
        each = meter.total * (1 / len(requests))
        watch.print(f"{each} for each of {len(requests)} clips")


def _stages(generator: Generator) -> list[tuple[str, Generator]]:
    """The stages of --cascade, each with its generator."""
    found = []
    for text in asked.CASCADE.value:
        stage, _, folder = text.partition("=")
        place, by = pathlib.Path(folder).absolute(), generator
        if folder:
            by = Generator.load(place, generator.mesh, generator.quantize)
        check_stage(by, stage)
        found.append((stage, by))
    return found


def _film(generator: Generator, request: Request) -> Film:
    """The film that a request and the flags ask for, complete and possible."""
    request = complete_window(generator, request)
    fps = request.frame_rate
    frames = round((asked.SECONDS.value or 0.0) * fps)
    if frames < 1:
        raise ValueError("--seconds says how long the film lasts; give it.")
    example = "SECONDS:PROMPT"
    scenes = [Scene(*asked.timed("scene", text, example)) for text in asked.SCENE.value]
    kept = {name: flag.value for name, flag in asked.FILM.items()}
    film = Film(request, frames, asked.EXTEND.value, scenes, **kept)
    film = check_film(generator, film)
    Followed(film.request, film.frames).read_given()
    return film


def _filmed(
    generator: Generator,
    settings: Settings,
    told: dict[str, Any],
    signed: "Provenance | None",
    film: Film,
) -> _Written:
    """Makes a film, and writes it while it is being made; see `_clips`."""
    request = film.request
    path = free_path(pathlib.Path(asked.OUT.value), clip_name(request), ".mp4")
    about, meter = request.settings | told, Meter()
    about |= {x: getattr(film, x) for x in ("frames", "carry", "sink")}
    about |= {"extend": asked.EXTEND.value, "scenes": [*map(list, film.scenes)]}

    def finish(path: pathlib.Path) -> None:  # the energy is known once it is done
        if signed:
            told = about | {"energy": meter.total.told}
            signed.signing(told, request, film.footage)(path)

    with Bars() as bars:
        task = bars.add_task("frames", total=film.frames)
        stills = write_film(
            path,
            generator,
            film,
            settings,
            metadata={"jvdit": about},
            scale=asked.ENLARGED.value or viewing_scale(request.size[1:]),
            on_frames=lambda done: bars.update(task, completed=done),
            tell=bars.print,
            finish=finish,
        )
        bars.print(f"{meter.total} for the film")
    return _Written(path, request.prompt, stills)


class _Shown(Bars):
    """Bars of the clips that are ready, and of what is done at the moment."""

    def __init__(self, count: int):
        super().__init__("{task.fields[energy]}")
        self._clips = self.add_task("clips", total=count, energy="")
        self._now = self.add_task("compiling", total=None, energy="")

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Shows how many steps or frames are done."""
        self.update(self._now, description=doing, total=total, completed=done)

    def clips(self, done: int, each: Energy) -> None:
        """Shows how many clips are ready, and the energy of each on average."""
        self.update(self._clips, completed=done, energy=str(each))


def main(argv: list[str]) -> None:
    """Parses, generates, and turns mistakes of the user into one line."""
    prompts = [(f"prompt {i}", line) for i, line in enumerate(argv[1:], 1)]
    with told_in_a_line("stopped; the clips that were ready are written."):
        keep_compilations()
        if asked.CHECK_LORA.value is not None:
            model = asked.named_bundle(make_mesh(devices=jax.devices()[:1]))
            print(report_adapters(model, asked.CHECK_LORA.value))
            return
        if asked.PROMPTS.value is not None:
            prompts += read_prompts(asked.PROMPTS.value)
        for path in sample(prompts):
            print(path)


if __name__ == "__main__":
    flag_parser.run(main)
