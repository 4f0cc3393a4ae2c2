"""Measures the oracle: what it says of wrong clips, and how fast it is.

    OPENBLAS_NUM_THREADS=1 taskset -c 0 python tools/oracle_table.py \
        --prototype world_probe.py

Prints a table in Markdown: of each kind of wrong clips (`evaluation.wrong_clips`) the
mean of the score that has to fall, and in parentheses that of real clips of the same
scenes. With `--prototype`, a file that defines `World` and `evaluate` like the probe
from which the world was made, the oracle and the drawing of clips take turns with it,
and the ratio of their CPU times follows. docs/oracle.md holds what this prints.
"""

import argparse
import importlib.util
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jvdit.data.world import World
from jvdit.evaluation import oracle
from jvdit.evaluation.wrong_clips import DEGRADED, WRONG, Wrong, real

BATCH = 64  # clips that are drawn, and scored, at once


def world_of(size: str) -> World:
    """The world's split val at a size written TxHxW@FPS."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)@([\d.]+)", size)
    if match is None:
        raise ValueError(f"`--sizes` (={size!r}) must read TxHxW@FPS; try 17x64x64@8.")
    frames, height, width = map(int, match.groups()[:3])
    return World("val", 0, frames, height, width, float(match[4]))


def row(world: World, wrong: Wrong, clips: int) -> str:
    """The mean score of wrong clips, and in parentheses that of real ones."""
    scenes = world.scenes(np.arange(clips))
    if wrong.concerns is not None:
        scenes = scenes.choose(np.flatnonzero(wrong.concerns(world, scenes)))
    shares = [
        oracle.means(oracle.score(draw(world, scenes), scenes, world.fps))[wrong.score]
        for draw in (wrong.draw, real)
    ]
    number = "" if wrong.concerns is None else f", {len(scenes.ids)} clips"
    return f"{shares[0]:.2f} ({shares[1]:.2f}{number})"


def print_table(sizes: list[str], clips: int) -> None:
    """Prints what the oracle says of wrong clips."""
    worlds = [world_of(size) for size in sizes]
    print(f"| clips | score | {' | '.join(sizes)} |")
    print("|---" * (2 + len(sizes)) + "|")
    kinds = [Wrong("real", name, real) for name in ("all", "physics")]
    for wrong in (*kinds, *WRONG.values(), *DEGRADED.values()):
        cells = " | ".join(row(world, wrong, clips) for world in worlds)
        print(f"| {wrong.seen} | `{wrong.score}` | {cells} |", flush=True)


def cpu_time(work: Callable[[], object]) -> float:
    """Seconds of CPU time that it takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def print_speed(prototype: Path, rounds: int) -> None:
    """Prints the ratios of the CPU times of a prototype to ours, in turns."""
    spec = importlib.util.spec_from_file_location("prototype", prototype)
    if spec is None or spec.loader is None or not prototype.is_file():
        raise ValueError(f"`--prototype` (={prototype}) must be a file of Python code.")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    ids = np.arange(BATCH)
    ours, other = World("val"), theirs.World("val")
    clips, scenes = ours.clips(ids), ours.scenes(ids)
    sound, others = clips["audio"][..., 0], other.batch(ids)
    pairs = {
        "oracle, with sound": (
            lambda: oracle.score(clips["video"], scenes, ours.fps, sound),
            lambda: theirs.evaluate(
                others["video"], others["audio"], others["spec"], ours.fps
            ),
        ),
        "clips with sound and caption": (
            lambda: ours.clips(ids),
            lambda: other.batch(ids),
        ),
    }
    for name, works in pairs.items():
        for work in works:
            work()
        times = []
        for turn in range(rounds):
            # Each goes first in every other round.
            pair = [cpu_time(work) for work in works[:: 1 - 2 * (turn % 2)]]
            times.append(pair[:: 1 - 2 * (turn % 2)])
        ratios = [second / first for first, second in times]
        rates = [BATCH / statistics.median(x) for x in zip(*times, strict=True)]
        print(
            f"{name}: {rates[0]:.0f} clips a second of CPU time, the prototype "
            f"{rates[1]:.0f}; ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)"
        )


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and the speed if there is a prototype to compare with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, default=128, help="clips at each size (default: %(default)s)")
    add(
        "--sizes",
        nargs="*",
        default=["17x64x64@8", "9x32x32@8"],
        metavar="TxHxW@FPS",
        help="frames, height, width and frame rate (default: 17x64x64@8 9x32x32@8); "
        "none: no table",
    )
    add("--prototype", type=Path, help="file of the prototype to take turns with")
    add("--rounds", type=int, default=21, help="turns of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.sizes:
            print_table(options.sizes, options.n)
        if options.prototype:
            print_speed(options.prototype, options.rounds)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
