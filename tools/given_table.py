"""Scores what a model makes of parts of true clips of the procedural world.

    python tools/given_table.py --workdir M --split single --n 64

A row for each row of `GIVEN` that the model takes: `kept`, PSNR in dB of what was given
(real: what the autoencoder alone makes of it); `truth`, that of the whole clip against
the true one; and of the oracle's scores: `all`, `physics`, and the error of positions
in the last frame, in radii. Nothing given, and the true clips, stand for comparison.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from jvdit.data.sheets import contact_sheet, write_png
from jvdit.data.world import World
from jvdit.evaluation import given as measures
from jvdit.evaluation import oracle
from jvdit.evaluation.giving_truth import GIVEN, Truth
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
_SHEET = flags.DEFINE_string("sheet", None, "PNG file: the first clip of each row.")


def scores(
    videos: np.ndarray, true: np.ndarray, where: np.ndarray, world: World
) -> dict[str, float]:
    """What is measured of a row."""
    scenes = world.scenes(np.arange(len(videos)))
    seen = oracle.observe(videos, scenes, world.fps)
    found = oracle.score(videos, scenes, world.fps)
    error = measures.position_error(seen.tracks, scenes, world.fps)
    jump = np.nanmean(error[:, -1]) if np.isfinite(error[:, -1]).any() else np.nan
    return {
        "kept": float(np.nanmean(measures.kept(videos, true, where)))
        if where.any()
        else np.nan,
        "truth": float(np.nanmean(measures.kept(videos, true, np.ones_like(where)))),
        "all": float(np.nanmean(found["all"])),
        "physics": float(np.nanmean(found["physics"])),
        "last": float(jump),
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
        head = ("kept", "truth", "all", "physics", "last")
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
    true = np.asarray(world.clips(np.arange(count), audio=False)["video"])
    captions = world.captions(np.arange(count))
    size = {name: getattr(world, name) for name in ("frames", "height", "width")}
    nothing = np.zeros(true.shape[:4], bool)
    coded = generator.codec
    latents = np.stack([coded.encode(x.astype(np.float32) / 127.5 - 1) for x in true])
    whole = coded.decode(latents)
    found = {"real": (scores(true, true, ~nothing, world), true[0])}
    found["autoencoder"] = scores(whole, true, ~nothing, world), whole[0]
    for name, row in GIVEN.items():
        if name == "sound" or (_WHAT.value and name not in _WHAT.value):
            continue
        requests = [
            Request(
                caption,
                fps=world.fps,
                seed=i,
                sound=False if name != "picture" else None,
                **size,
                **row.fields(Truth(video, world.fps)),
            )
            for i, (caption, video) in enumerate(zip(captions, true, strict=True))
        ]
        try:
            generator.check(requests[0])
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        clips = generator(requests, rows=32, steps=_STEPS.value)
        videos = np.stack([clip.video for clip in clips])
        where = np.stack([row.where(video) for video in true])
        found[name] = scores(videos, true, where, world), videos[0]
    return found


if __name__ == "__main__":
    flag_parser.run(main, "workdir")
