"""Checks the oracle's thresholds by varying each, on the world's val split.

    python tools/thresholds.py [--n 192] [--sizes 17x64x64@8,17x32x32@16]

A threshold decides a score. A good one passes real clips and fails clips that are wrong
in the respect that the score measures: its margin is the mean score of real clips minus
the highest mean score of wrong ones. Each line shows the margins at several multiples
of the threshold in use, the worst over the sizes; the last columns show the best
multiple, and how much it would gain.

With 96 clips at both sizes no other multiple gains more than 0.05, except for the
largest turn from the captioned direction: 15 degrees would gain 0.07, but 30 are in
use, because the world's own directions already vary by 12.
"""

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jvdit.data.world import World
from jvdit.data.world.scene import SHAPES
from jvdit.evaluation import oracle
from jvdit.machine import flag_parser

_N = flags.DEFINE_integer("n", 192, "Clips of the val split to score at each size.")
_SIZES = flags.DEFINE_list(
    "sizes",
    ["17x64x64@8", "17x32x32@16"],
    "Frames, height, width and frame rate of the clips, each as TxHxW@FPS.",
)

FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0)


class Threshold(NamedTuple):
    """A threshold: a constant of a module of `jvdit.evaluation`.

    Attributes:
        module, name: name of the module, and of the constant.
        score: the score that it decides.
        wrong: names of the changes in `WRONG` whose clips must fail.
    """

    module: str
    name: str
    score: str
    wrong: tuple[str, ...]


THRESHOLDS = (
    Threshold("detection", "_LEAST_CHROMA", "color", ("captions", "noise")),
    Threshold("detection", "_LEAST_AREA", "count", ("captions", "noise")),
    Threshold("detection", "_MOST_SPREAD", "color", ("captions", "noise")),
    Threshold("detection", "_SURELY_ONE", "count", ("twins",)),
    Threshold("tracks", "_SEEN", "color", ("captions", "gone")),
    Threshold("adherence", "_LEAST_IOU", "shape", ("captions", "round")),
    Threshold("adherence", "_MOST_TURN", "direction", ("reversed", "frozen")),
    Threshold("adherence", "_FLIGHT", "direction", ("reversed", "frozen")),
    Threshold("adherence", "_LEAST_STEP", "direction", ("reversed", "frozen")),
    Threshold("physics", "_NEAR", "physics", ("jitter", "captions")),
    Threshold("physics", "_FIRM", "physics", ("tired", "jitter")),
    Threshold("physics", "_FASTEST", "physics", ("shuffled", "jitter")),
    Threshold("physics", "_MOVING", "physics", ("frozen",)),
    Threshold("physics", "_MOST_RESIDUAL", "physics", ("jitter", "shuffled")),
    Threshold("physics", "_LEAST_EXPLAINED", "physics", ("jitter", "captions")),
    Threshold("physics", "_RESTITUTION_ERROR", "physics", ("tired",)),
    Threshold("physics", "_GRAVITY_ERROR", "physics", ("light", "tired")),
    Threshold("sound", "_APART", "sync", ("late", "sounds")),
    Threshold("sound", "_IN_STEP", "sync", ("late", "sounds")),
)


class Clips(NamedTuple):
    """Clips with their sound, and the scenes that they should show."""

    world: World
    scenes: Any
    video: np.ndarray
    audio: np.ndarray

    def scored(self, score: str) -> float:
        """The mean of a score; sound, which takes longest, is scored only if needed."""
        audio = self.audio if score == "sync" else None
        found = oracle.score(self.video, self.scenes, self.world.fps, audio)
        return oracle.means({score: found[score]})[score]


def clips(size: str) -> Clips:
    """Renders the world's own clips of the val split, at a size written TxHxW@FPS."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)@([\d.]+)", size)
    if match is None:
        raise ValueError(f"a size (={size!r}) must read TxHxW@FPS.")
    frames, height, width = map(int, match.groups()[:3])
    world = World("val", 0, frames, height, width, float(match[4]))
    scenes = world.scenes(np.arange(_N.value))
    motion = world.simulate(scenes)
    audio = world.synthesize(scenes, motion)[..., 0]
    return Clips(world, scenes, world.render(scenes, motion), audio)


def _jitter(video: np.ndarray) -> np.ndarray:
    reach = max(1, min(video.shape[2:4]) // 32)
    by = np.random.default_rng(0).integers(-reach, reach + 1, (video.shape[1], 2))
    moved = [np.roll(video[:, t], by[t], (1, 2)) for t in range(video.shape[1])]
    return np.stack(moved, 1)


def _twins(real: Clips) -> Clips:
    """Shows every object a second time, half a frame further right."""
    video = real.video.copy()
    chroma = video.max(-1).astype(int) - video.min(-1)
    again = np.roll(video, video.shape[3] // 2, 3)
    apart = np.roll(chroma, video.shape[3] // 2, 3) > chroma
    return real._replace(video=np.where(apart[..., None], again, video))


def _round(real: Clips) -> Clips:
    """Replaces every object by a disc, whatever the caption says."""
    discs = np.full_like(real.scenes.shape, SHAPES.index("circle"))
    scenes = dataclasses.replace(real.scenes, shape=discs)
    return real._replace(video=real.world.render(scenes, real.world.simulate(scenes)))


def _weightless(real: Clips) -> Clips:
    still = np.zeros_like(real.scenes.gravity)
    floating = dataclasses.replace(real.scenes, gravity=still)
    motion = real.world.simulate(floating)
    return real._replace(video=real.world.render(floating, motion))


def _tired(real: Clips) -> Clips:
    motion = real.world.simulate(real.scenes, restitution=0.7)
    return real._replace(video=real.world.render(real.scenes, motion))


def _order(frames: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(frames)


WRONG: dict[str, Callable[[Clips], Clips]] = {
    "captions": lambda c: c._replace(video=np.roll(c.video, 1, 0)),
    "noise": lambda c: c._replace(
        video=np.random.default_rng(0).integers(0, 256, c.video.shape, np.uint8)
    ),
    "twins": _twins,
    "gone": lambda c: c._replace(
        video=np.where(
            (np.arange(c.video.shape[1]) % 2 == 0)[None, :, None, None, None],
            c.video,
            np.uint8(90),
        )
    ),
    "round": _round,
    "reversed": lambda c: c._replace(video=c.video[:, ::-1]),
    "shuffled": lambda c: c._replace(video=c.video[:, _order(c.video.shape[1])]),
    "frozen": lambda c: c._replace(
        video=np.repeat(c.video[:, :1], c.video.shape[1], 1)
    ),
    "jitter": lambda c: c._replace(video=_jitter(c.video)),
    "tired": _tired,
    "light": _weightless,
    "late": lambda c: c._replace(audio=np.roll(c.audio, 960, 1)),
    "sounds": lambda c: c._replace(audio=np.roll(c.audio, 1, 0)),
}


def margins(threshold: Threshold, real: Clips, wrong: dict[str, Clips]) -> list[float]:
    """The score of real clips minus the highest of wrong ones, at each multiple."""
    module = importlib.import_module(f"jvdit.evaluation.{threshold.module}")
    shipped, found = getattr(module, threshold.name), []
    for factor in FACTORS:
        setattr(module, threshold.name, shipped * factor)
        passed = [wrong[name].scored(threshold.score) for name in threshold.wrong]
        found.append(real.scored(threshold.score) - max(passed))
    setattr(module, threshold.name, shipped)
    return found


def main(argv: list[str]) -> None:
    """Measures all thresholds and prints the table."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; see --help")
    try:
        sets = [clips(size) for size in _SIZES.value]
    except ValueError as error:
        sys.exit(f"error: {error}")
    changed = [{name: change(real) for name, change in WRONG.items()} for real in sets]
    table = Table("threshold", "score", "not", *map(str, FACTORS), "best", "gain")
    for threshold in track(THRESHOLDS, "thresholds"):
        pairs = zip(sets, changed, strict=True)
        found = np.min([margins(threshold, *pair) for pair in pairs], axis=0)
        best = int(found.argmax())
        table.add_row(
            f"{threshold.module}.{threshold.name}",
            threshold.score,
            ", ".join(threshold.wrong),
            *(f"{value:.3f}" for value in found),
            str(FACTORS[best]),
            f"{found[best] - found[FACTORS.index(1.0)]:.3f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    flag_parser.run(main)
