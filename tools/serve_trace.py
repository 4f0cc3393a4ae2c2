"""Serves one trace of mixed requests in three ways, and times the clips.

    python tools/serve_trace.py
    python tools/serve_trace.py --count 12 --interval 1 --rows 208 --batches 2

The server's own thread makes them of the model in the box: packed, clips entering and
leaving rows between steps; one after another; and in batches of those that wait and are
alike in size, steps, guidance and condition. Requests of three sizes, two lengths of
sampling and two strengths of guidance, some with a first frame, come at random times.
A first pass, which isn't timed, compiles. On a machine that others use, `taskset -c 1
python tools/serve_trace.py --cpu` counts the time of one core, without that of others.
"""

import argparse
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from jvdit.generation.generator import Generator
from jvdit.machine.command import told_in_a_line
from jvdit.serving.jobs import DONE, Jobs, VideoJob
from jvdit.serving.packed import Packed
from jvdit.serving.served import Served
from jvdit.serving.video_request import VideoRequest
from jvdit.serving.worker import Worker
from jvdit.sharding import make_mesh

_PROMPTS = "a small red circle.", "a large purple square.", "a medium blue triangle."
_GLANCE = 0.005  # seconds between two looks
_SIZES = ("32x32", 9), ("32x32", 1), ("24x16", 5)  # the first is the model's own


class Arrival(NamedTuple):
    """A request: when it comes in seconds, its fields, and a first frame perhaps."""

    when: float
    fields: Mapping[str, Any]
    files: Mapping[str, Sequence[bytes]]


def trace(count: int, interval: float, seed: int) -> list[Arrival]:
    """Mixed requests, so many seconds apart on average."""
    rng, when, found = np.random.default_rng(seed), 0.0, []
    for number in range(count):
        size, frames = _SIZES[rng.choice(3, p=(0.5, 0.25, 0.25))]
        fields = {"prompt": f"one object: {rng.choice(_PROMPTS)}", "seed": number}
        fields |= {"size": size, "num_frames": frames}
        fields["num_inference_steps"] = int(rng.choice((6, 12)))
        fields["guidance_scale"] = float(rng.choice((1.0, 2.0)))
        given = frames > 1 and rng.random() < 0.3
        files = {"image": [_picture(size, rng)]} if given else {}
        found.append(Arrival(when, fields, files))
        when += rng.exponential(interval)
    return found


def _picture(size: str, rng: np.random.Generator) -> bytes:
    width, height = map(int, size.split("x"))
    pixels = np.broadcast_to(rng.integers(0, 255, 3), (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "png")
    return file.getvalue()


class Batches(Worker):
    """Makes jobs that are alike together, as many as wait, to a power of two."""

    def __init__(self, jobs: Jobs, served: Served, most: int):
        super().__init__(jobs, served)
        self.most = most

    def _alone(self, job: VideoJob) -> None:
        wanted = _kind(job.asked, job.files)
        waiting = self.jobs.waiting()
        alike = [x for x in waiting if _kind(x.asked, x.files) == wanted]
        count = 1 << (min(len(alike), self.most).bit_length() - 1)
        batch = [x for x in alike[:count] if self.jobs.begin(x)]
        orders = [self._order(x) for x in batch]
        requests, settings = [x for x, _ in orders], orders[0][1]
        made = self.served.generator.clips(requests, settings, rows=len(batch))
        for i, clip in made:
            self.finish(batch[i], clip, self._meter.lap())


def _kind(asked: VideoRequest, files: Iterable[str]) -> tuple[Any, ...]:
    how = asked.num_inference_steps, asked.guidance_scale
    return asked.size, asked.num_frames, *how, *files


class Clock:
    """Seconds: of the wall, or of the processor, of which others take nothing.

    The processor's stands still while nothing is to be done; then it is put forward.
    """

    def __init__(self, cpu: bool):
        self._read = time.process_time if cpu else time.monotonic
        self._cpu, self._begun = cpu, self._read()

    def __call__(self) -> float:
        """The time since it was made."""
        return self._read() - self._begun

    def wait(self, until: float, idle: bool) -> None:
        """Waits a little for a time to come, or goes there at once."""
        if idle and self._cpu:
            self._begun -= max(until - self(), 0)
        time.sleep(_GLANCE)


def timed(worker: Worker, arrivals: Sequence[Arrival], clock: Clock) -> np.ndarray:
    """When each clip was asked for, and when it was there, [clips 2], in seconds."""
    jobs, times = list[VideoJob](), np.zeros((len(arrivals), 2))
    while len(jobs) < len(arrivals) or not times[:, 1].all():
        now = clock()
        if len(jobs) < len(arrivals) and arrivals[len(jobs)].when <= now:
            times[len(jobs), 0] = arrivals[len(jobs)].when
            jobs.append(asked(worker.jobs, arrivals[len(jobs)]))
            continue
        for i, job in enumerate(jobs):
            if job.over and not times[i, 1]:
                times[i, 1] = now
        busy = not times[: len(jobs), 1].all()
        until = arrivals[len(jobs)].when if len(jobs) < len(arrivals) else now
        clock.wait(until, not busy)
    check(jobs)
    return times


def asked(jobs: Jobs, arrival: Arrival) -> VideoJob:
    """Puts a request in the queue."""
    id, names = jobs.receive(arrival.files)
    return jobs.add(id, names, VideoRequest.of(arrival.fields), {})


def check(jobs: Sequence[VideoJob]) -> None:
    """Raises a ValueError if a clip wasn't made, and says why."""
    if lost := [job for job in jobs if job.status != DONE]:
        raise ValueError(f"{len(lost)} failed, the first: {lost[0].error}")


def kinds_of(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """A request of each kind."""
    return [*{_kind(VideoRequest.of(x.fields), x.files): x for x in arrivals}.values()]


def warm_up(worker: Worker, arrivals: Sequence[Arrival]) -> None:
    """Compiles what a trace needs; of batches every size."""
    for power in range(getattr(worker, "most", 1).bit_length()):
        for one in kinds_of(arrivals):
            prompts = itertools.cycle({**one.fields, "prompt": x} for x in _PROMPTS)
            several = itertools.islice(prompts, 1 << power)
            with worker.jobs.changed:  # the worker sees all at once
                jobs = [
                    asked(worker.jobs, one._replace(fields=fields))
                    for fields in several
                ]
            while not all(job.over for job in jobs):
                time.sleep(_GLANCE)
            check(jobs)


def figures(times: np.ndarray) -> list[str]:
    """Clips a minute, and the seconds that half, and 95 %, of the clips took."""
    waits = times[:, 1] - times[:, 0]
    rate = 60 * len(times) / (times[:, 1].max() - times[0, 0])
    return [f"{x:.1f}" for x in (rate, *np.percentile(waits, (50, 95)))]


def ways(
    rows: Sequence[int], batches: Sequence[int]
) -> dict[str, Callable[..., Worker]]:
    """Makes the worker of each way, from its queue; they share what is compiled."""
    generator = Generator.load(mesh=make_mesh(devices=jax.devices()[:1]))

    def packed(jobs: Jobs, tokens: int) -> Worker:
        served = Served(generator, "box", tokens)
        return Worker(jobs, served, Packed(generator, tokens, tokens // 100, 100))

    plain = Served(generator, "box")
    found: dict[str, Callable[..., Worker]] = {
        f"packed, a row of {tokens} tokens": partial(packed, tokens=tokens)
        for tokens in rows
    }
    found["one after another"] = partial(Worker, served=plain)
    for most in batches:
        made = partial(Batches, served=plain, most=most)
        found[f"alike, up to {most} in a batch"] = made
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="requests")
    parser.add_argument("--interval", type=float, default=0.3, help="seconds between")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--rows", default="208,464", help="tokens of a packed row")
    parser.add_argument("--batches", default="2,4", help="most clips of a batch")
    parser.add_argument(
        "--cpu", action="store_true", help="time by the processor's clock"
    )
    args = parser.parse_args()
    arrivals = trace(args.count, args.interval, args.seed)
    rows, batches = (
        [int(x) for x in text.split(",") if x] for text in (args.rows, args.batches)
    )
    title = f"{args.count} requests of {len(kinds_of(arrivals))} kinds, "
    title += f"{args.interval:g} s apart on average"
    table = Table("", "clips/min", "p50 s", "p95 s", "warm-up s", title=title)
    for name, make in ways(rows, batches).items():
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock(args.cpu)
            worker = make(Jobs(Path(folder)))
            worker.start()
            worker.ready.wait()
            warm_up(worker, arrivals)
            spent = clock()
            found = figures(timed(worker, arrivals, Clock(args.cpu)))
            worker.stop(0)
        table.add_row(name, *found, f"{spent:.0f}")
        print(name, *found, f"{spent:.0f}", file=sys.stderr, flush=True)
    Console().print(table)


if __name__ == "__main__":
    with told_in_a_line("stopped."):
        main()
