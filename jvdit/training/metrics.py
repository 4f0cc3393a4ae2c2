"""Training metrics: TensorBoard, a progress bar, throughput and MFU."""

import json
import math
import os
import pathlib
import time
import timeit
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from jvdit.data.sheets import contact_sheet, write_png
from jvdit.machine.chips import this_chip
from jvdit.machine.energy import Energy, Meter
from jvdit.machine.json_files import parse_json
from jvdit.training.loggers import TensorBoard, WandB, logger_named

_HISTORY = "history.jsonl"
_JOULES = "energy/joules"  # in the history


def peak_flops() -> float:
    """Peak FLOP/s of one device: as published, or else measured with a matmul."""
    if peak := this_chip().peak:
        return peak
    size, tries = 1024, 5
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)

    def measure() -> None:
        product(x).block_until_ready()

    measure()  # compiles it
    best = min(timeit.repeat(measure, number=1, repeat=tries))
    # Simulated CPU devices share the cores that this product used.
    return 2 * size**3 / best / jax.local_device_count()


class Metrics:
    """Writes scalars and images; shows a progress bar with throughput and ETA.

    Only process 0 writes and prints, except for `say(everywhere=True)`. Use as a
    context manager.

    Args:
        workdir: what is logged goes to a folder inside, and the scalars to
            `history.jsonl`, a line for each step that has any.
        steps: how many steps the whole run has.
        start: steps already done.
        title: text in front of the progress bar.
        logger: name of where they are logged as well, in `LOGGERS`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        steps: int,
        start: int,
        title: str,
        logger: str = "tensorboard",
    ):
        lead = jax.process_index() == 0
        self._console, self._steps = Console(quiet=not lead), steps
        self._history = pathlib.Path(workdir) / _HISTORY
        self._logger: TensorBoard | WandB | None = None
        if lead:
            self._logger = logger_named(logger)(os.fspath(workdir))
            self._end_line()
        status = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            # A narrow terminal cuts off the end of the status.
            TextColumn("{task.fields[status]}", table_column=status),
            console=self._console,
            expand=True,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task(
            title, total=steps, completed=start, status="compiling"
        )

    def __enter__(self):
        self._progress.start()
        if not self._console.is_terminal:
            self.say("compiling …")
        return self

    def __exit__(self, *_):
        self._progress.stop()
        if self._logger:
            self._logger.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes scalars under their names; those that are NaN are left out."""
        if not self._logger:
            return
        finite = {k: float(v) for k, v in values.items() if not math.isnan(float(v))}
        for name, value in finite.items():
            self._logger.scalar(step, name, value)
        with self._history.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def _end_line(self):
        """Ends the line that a killed run, or a full disk, has cut off."""
        if self._history.exists() and not self._history.read_bytes().endswith(b"\n"):
            with self._history.open("a") as file:
                file.write("\n")

    def sheet(
        self,
        step: int,
        name: str,
        folder: pathlib.Path,
        videos: Any,
        captions: Any,
        sounds: Any = None,
    ) -> None:
        """Logs a contact sheet, and writes it to a file of the step's name."""
        if self._logger:
            sheet = contact_sheet(videos, captions, sounds=sounds)
            self._logger.image(step, name, sheet)
            write_png(folder / f"step_{step:07d}.png", sheet)

    def show(self, step: int, status: str) -> None:
        """Advances the progress bar to a step, with a status beside it.

        Prints a line instead where the output is no terminal.
        """
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._steps} {status}")
        self._progress.update(self._task, completed=step, status=status)

    def say(self, message: str, everywhere: bool = False) -> None:
        """Prints a line above the progress bar.

        Args:
            message: the line.
            everywhere: print it from every process, each with its index in front;
                False: from process 0 alone.
        """
        console = self._console
        if everywhere and jax.process_count() > 1:
            message = f"process {jax.process_index()}: {message}"
            console = console if self._logger else Console()
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Makes what was logged visible."""
        if self._logger:
            self._logger.flush()


def read_history(workdir: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Reads the scalars of a run: for each name its (step, value) pairs, in order.

    A step that was repeated after a restart has its latest value.
    """
    file = pathlib.Path(workdir) / _HISTORY
    found: dict[str, dict[int, float]] = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            values = parse_json(line, str(file), dict[str, float])
            step = int(values.pop("step"))
        except (ValueError, KeyError, OverflowError):
            continue  # the run was killed while it wrote this
        for name, value in values.items():
            found.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def status_line(values: dict[str, float], speed: dict[str, float], bad: int) -> str:
    """The status beside the progress bar: loss, throughput, skipped steps, bad clips.

    Args:
        values: the step's metrics; "loss" and "skipped" among them.
        speed: from `Throughput.rates`.
        bad: how many clips couldn't be read so far.
    """
    parts = [f"loss {values['loss']:.4f}"]
    if "psnr" in values:
        parts.append(f"psnr {values['psnr']:.1f} dB")
    parts += [
        f"{speed[name]:.3g} {name.removesuffix('_per_s')}/s"
        for name in ("steps_per_s", "clips_per_s", "tokens_per_s")
        if name in speed
    ]
    if "mfu" in speed:
        parts.append(f"MFU {speed['mfu']:.0%}")
    parts.append(f"idle {speed['idle']:.0%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']:.0f}")
    if bad:
        parts.append(f"bad clips {bad}")
    return " ".join(parts)


class Spent:
    """The energy of a whole run, over its restarts.

    Args:
        workdir: of the run, whose history says what was spent before.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        points = read_history(workdir).get(_JOULES, [])
        self._before, self._meter = points[-1][1] if points else 0.0, Meter()

    @property
    def total(self) -> Energy:
        """The energy so far; what a killed run spent after its last log isn't in it."""
        now = self._meter.total
        before = Energy(self._before, now.source)
        return now + before if self._before else now

    @property
    def scalars(self) -> dict[str, float]:
        """The same, to be logged."""
        return {_JOULES: self.total.joules}


class Throughput:
    """Measures throughput over the steps since the last call of `rates`.

    Args:
        flops_per_step: FLOPs of the model in a step, forward and backward, without
            recomputation; 0: MFU isn't reported.
    """

    def __init__(self, flops_per_step: float = 0.0):
        self._flops = flops_per_step
        self._peak = peak_flops() * jax.device_count() if flops_per_step else 0.0
        self._time, self._counts = time.perf_counter(), {"steps": 0.0}
        self._idle = 0.0

    def add(self, idle: float, **counts: float) -> None:
        """Counts a step: the seconds it waited for data, and its clips, tokens, …."""
        self._idle += idle
        for name, count in {"steps": 1.0, **counts}.items():
            self._counts[name] = self._counts.get(name, 0.0) + count

    def rates(self) -> dict[str, float]:
        """Rates since the last call: counts per second; `idle` and `mfu` in [0, 1]."""
        now = time.perf_counter()
        seconds = max(now - self._time, 1e-9)
        rates = {f"{k}_per_s": v / seconds for k, v in self._counts.items()}
        rates["idle"] = self._idle / seconds
        if self._peak:
            rates["mfu"] = rates["steps_per_s"] * self._flops / self._peak
        self._time, self._counts, self._idle = now, {"steps": 0.0}, 0.0
        return rates
