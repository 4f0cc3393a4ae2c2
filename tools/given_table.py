"""Scores what a model makes of parts of true clips of the procedural world.

    python tools/given_table.py --workdir M --split single --n 64

A row for each row of `GIVEN` that the model takes: `kept`, PSNR in dB of what was given
(real: what the autoencoder alone makes of it); `truth`, that of the whole clip against
the true one; and of the oracle's scores: `all`, `physics`, and the error of positions
in the last frame, in radii. Nothing given, and the true clips, stand for comparison.

`wavers` is the median error, in pixels, of positions that the world's laws foretell
from two frames that follow one another; and `heard` is how well the bounces that are
seen agree with the true clip's sound, F1 at 40 ms.

With `--strength 0.1,0.2,0.4` the true clips are made anew instead, by these shares of
the steps (`jvdit.sample --restyle`), which tells at what noise a model loses what.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from jvdit.data.sheets import contact_sheet, write_png
from jvdit.data.world import World
from jvdit.evaluation import given as measures
from jvdit.evaluation import oracle
from jvdit.evaluation.giving_truth import GIVEN, Giving
from jvdit.evaluation.oracle import laws
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.machine import flag_parser
from jvdit.machine.command import refuse_arguments, told_in_a_line
from jvdit.machine.compilation import keep_compilations

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the model.")
_SPLIT = flags.DEFINE_string("split", "single", "Split of the world.")
_SIZE = flags.DEFINE_string(
    "clip", "9x32x32@8", "FRAMESxHEIGHTxWIDTH@FPS of the clips."
)
_SEED = flags.DEFINE_integer("seed", 1, "World seed; training has 0.")
_N = flags.DEFINE_integer("n", 64, "Clips of each row.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Solver steps.")
_WHAT = flags.DEFINE_list("given", [], "Rows (default: all that the model takes).")
flags.register_validator(
    "given",
    lambda names: {*names} <= {*GIVEN},
    f"must be among: {', '.join(GIVEN)}",
)
_STRENGTH = flags.DEFINE_list(
    "strength", [], "Restyle the clips instead, by these strengths: 0.1,0.2,0.4."
)
flags.register_validator(
    "strength",
    lambda texts: all(re.fullmatch(r"0?\.\d+|1(\.0*)?", text) for text in texts),
    "must be numbers over 0 and up to 1, with commas between them",
)
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Guidance scale.")
_SHEET = flags.DEFINE_string("sheet", None, "PNG file: the first clip of each row.")


def scores(
    videos: np.ndarray, true: dict[str, np.ndarray], where: np.ndarray, world: World
) -> dict[str, float]:
    """What is measured of a row."""
    scenes = world.scenes(np.arange(len(videos)))
    seen = oracle.observe(videos, scenes, world.fps)
    found = oracle.score(videos, scenes, world.fps)
    sound = true["audio"].mean(-1), world.audio_rate
    heard = oracle.listen(seen, scenes, world.fps, *sound)["sync_40ms"]
    short = min(videos.shape[2:4])
    far, known = laws.errors(seen.tracks, scenes, world.fps)
    error = measures.position_error(seen.tracks, scenes, world.fps)
    jump = np.nanmean(error[:, -1]) if np.isfinite(error[:, -1]).any() else np.nan
    return {
        "kept": float(np.nanmean(measures.kept(videos, true["video"], where)))
        if where.any()
        else np.nan,
        "truth": float(np.nanmean(measures.kept(videos, true["video"], where | True))),
        "all": float(np.nanmean(found["all"])),
        "physics": float(np.nanmean(found["physics"])),
        "last": float(jump),
        "wavers": float(np.median(far[known]) * short),
        "heard": float(np.nanmean(heard)),
    }


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    refuse_arguments(argv)
    with told_in_a_line("stopped"):
        keep_compilations()
        generator = Generator.load(_WORKDIR.value)
        size, _, fps = _SIZE.value.partition("@")
        frames, height, width = map(int, size.split("x"))
        world = World(_SPLIT.value, _SEED.value, frames, height, width, fps=float(fps))
        rows = table(generator, world, _N.value)
        head = ("kept", "truth", "all", "physics", "last", "wavers", "heard")
        print(f"{'given':12}" + "".join(f"{name:>9}" for name in head))
        shown = {}
        for name, (found, video) in rows.items():
            print(f"{name:12}" + "".join(f"{found[x]:9.2f}" for x in head))
            shown[name] = video
        if _SHEET.value:
            sheet = contact_sheet([*shown.values()], [*shown])
            write_png(pathlib.Path(_SHEET.value), sheet)


def table(
    generator: Generator, world: World, count: int
) -> dict[str, tuple[dict[str, float], np.ndarray]]:
    """The scores of each row, and its first clip."""
    true = world.clips(np.arange(count), audio=True)
    videos, captions = np.asarray(true["video"]), world.captions(np.arange(count))
    size = {name: getattr(world, name) for name in ("frames", "height", "width")}
    everywhere = np.ones(videos.shape[:4], bool)
    coded = generator.codec
    latents = np.stack([coded.encode(x.astype(np.float32) / 127.5 - 1) for x in videos])
    whole = coded.decode(latents)
    found = {"real": (scores(videos, true, everywhere, world), videos[0])}
    found["autoencoder"] = scores(whole, true, everywhere, world), whole[0]
    for name, (row, settings) in rows_of().items():
        truths = row.truths(world, np.arange(count))
        requests = [
            Request(
                caption,
                fps=world.fps,
                seed=i,
                sound=None if name == "picture" or row.reads == "audio" else False,
                **size,
                **row.fields(truth),
            )
            for i, (caption, truth) in enumerate(zip(captions, truths, strict=True))
        ]
        try:
            generator.check(requests[0])
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        clips = generator(requests, rows=32, **settings)
        made = np.stack([clip.video for clip in clips])
        where = np.stack([row.where(video) for video in videos])
        found[name] = scores(made, true, where, world), made[0]
    return found


def rows_of() -> dict[str, tuple[Giving, dict[str, Any]]]:
    """What is given in each row that the flags ask for, and with which settings."""
    common = {"steps": _STEPS.value, "guidance_scale": _GUIDANCE.value}
    if _STRENGTH.value:
        row = Giving(lambda x: {"restyle": x.video}, GIVEN["upscale"].where)
        made = {
            f"restyle {x}": common | {"strength": float(x)} for x in _STRENGTH.value
        }
        return {name: (row, settings) for name, settings in made.items()}
    names = _WHAT.value or [k for k, row in GIVEN.items() if row.reads != "audio"]
    return {name: (GIVEN[name], common) for name in names}


if __name__ == "__main__":
    flag_parser.run(main, "workdir")
