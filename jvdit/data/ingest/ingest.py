"""Videos to a data set of clips: in parallel, supervised, resumable.

The unit of work is a shard, which is a fixed group of source files: a job that was
killed repeats the shard it was at and nothing else, and the result is the same to the
byte.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from jvdit.data.ingest.beam import Engine
from jvdit.data.ingest.clip_file import ClipFile, Recipe, prepare_file
from jvdit.data.ingest.ingest_report import ASIDE, Entry, Report, describe_file
from jvdit.data.ingest.listing import list_items
from jvdit.data.ingest.shard_plan import Plan, plan_shards
from jvdit.data.ingest.supervisor import supervise
from jvdit.data.manifest import MadeOf
from jvdit.data.record_features import clip_features
from jvdit.data.record_writer import RecordWriter
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json
from jvdit.machine.progress import Bars
from jvdit.machine.text_files import printable

_REMAKE = "remove the data set and make it again"


def ingest(
    inputs: Iterable[str | Path],
    out: str | Path,
    recipe: Recipe,
    *,
    root: str | Path | None = None,
    val_fraction: float | int = 0.0,
    shard_size: int = 64,
    workers: int | None = None,
    timeout: float | int = 120.0,
    overwrite: bool = False,
    listed: Callable[[Sequence[ClipFile]], None] = lambda items: None,
    engine: Engine | None = None,
    work: Callable[[ClipFile, Recipe], Iterable[Mapping[str, Any]]] = prepare_file,
) -> Report:
    """Makes a data set of clips out of videos, or finishes one that was begun.

    What became of every file is returned, and is in its `report.json` and `report.md`.

    Args:
        inputs: folders, tables and videos; see `list_items`.
        out: directory of the data set.
        recipe: how clips are cut.
        root: what relative paths in tables are relative to.
        val_fraction: share of the files that goes to split "val".
        shard_size: source files of a shard: what a kill can cost.
        workers: number of processes; None: one for each core, or with an `engine` one
            for each shard.
        timeout: seconds that one clip may take.
        overwrite: whether a data set that is already there is removed first.
        listed: is called with all items before the work begins, and may raise.
        engine: runs the shards elsewhere, where the same folders are mounted; see
            `beam_engine`. None: they are done here.
        work: what is done to a file; another one than `prepare_file` only in tests.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: no video is found or can be used, or `out` holds something else.
    """
    sizes = {"val_fraction": val_fraction, "shard_size": shard_size}
    plan, meant = _planned(inputs, root, listed, **sizes)
    settings = {"recipe": dataclasses.asdict(recipe), "files": plan.digest}
    shards = collections.Counter(split for split, _ in plan.shards)
    items = itertools.chain.from_iterable(plan.shards.values())
    beside = {name for item in items for name in item.beside}
    features = clip_features(sorted(beside))
    made = {"shards": shards, "settings": settings, "overwrite": overwrite}
    writer = RecordWriter(out, features, **made)
    if writer.finished:
        return Report.read(writer.path)
    prepare = functools.partial(work, recipe=recipe)
    with writer.alone(), _progress(plan.files) as advance:
        if engine is not None:
            shard = functools.partial(
                prepare_shard, prepare=prepare, workers=workers or 1, timeout=timeout
            )
            _elsewhere(engine, writer, plan, shard)
        entries = _fill(writer, plan, prepare, workers, timeout, advance)
        report = Report(sorted(entries, key=lambda e: e["file"]), settings["recipe"])
        report.write(writer.path)
        if not report.clips:
            raise ValueError(
                f"None of the {meant} videos could be used: {report.summary()}; "
                f"see {writer.path / 'report.md'}."
            )
        writer.finish()
    return report


def _planned(
    inputs: Iterable[str | Path],
    root: str | Path | None,
    listed: Callable[[Sequence[ClipFile]], None],
    **sizes: Any,
) -> tuple[Plan, int]:
    """Lists files and assigns them to shards; also returns how many are meant.

    Raises:
        ValueError: none can be read.
    """
    with Bars() as bars:
        bars.add_task(f"listing {', '.join(map(str, inputs))}", total=None)
        items = list_items(inputs, root=root)
        listed(items)
        plan = plan_shards(items, **sizes)
    meant = sum(item.reason not in ASIDE for item in items)
    if not plan.shards:
        raise ValueError(
            f"None of the {meant} videos can be read; the first, "
            f"{plan.refused[0][0].key}: {printable(' '.join(plan.refused[0][1:]))}."
        )
    return plan, meant


class Job(NamedTuple):
    """A shard to be prepared, wherever: what its writer is made of, and its files."""

    path: str
    plan: MadeOf
    split: str
    shard: int
    files: list[ClipFile]


def prepare_shard(job: Job, prepare: Any, workers: int, timeout: float | int) -> None:
    """Writes one shard of a data set that was begun, unless it is done.

    Args:
        job: the shard.
        prepare: function of a file, see `prepare_file`.
        workers: number of processes.
        timeout: seconds that one clip may take.

    Raises:
        ValueError: the data set wasn't begun in this folder.
    """
    if not (Path(job.path) / "_work/plan.json").exists():
        raise ValueError(
            f"a worker finds no data set at {job.path}; give an --out on a file system "
            "that all workers mount at one place."
        )
    plan = msgspec.structs.asdict(job.plan)
    writer = RecordWriter(job.path, **plan)
    if not writer.is_done(job.split, job.shard):
        events = supervise(prepare, job.files, workers=workers, timeout=timeout)
        with contextlib.closing(events):
            _write(writer, job.split, job.shard, job.files, events, lambda entry: None)


def _elsewhere(engine: Engine, writer: RecordWriter, plan: Plan, work: Any) -> None:
    """Has an engine write the shards that are missing.

    Raises:
        ValueError: some are missing all the same.
    """
    path = str(writer.path.absolute())
    jobs = [
        Job(path, writer.plan, *at, [_absolute(item) for item in files])
        for at, files in plan.shards.items()
        if not writer.is_done(*at)
    ]
    if jobs:
        engine(work, jobs)
    missing = [job for job in jobs if not writer.is_done(job.split, job.shard)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(jobs)} shards aren't in {path}; give an --out on "
            "a file system that all workers mount at one place."
        )


def _absolute(item: ClipFile) -> ClipFile:
    files = {"path": item.path, **item.beside}
    return item._replace(**{k: os.path.abspath(path) for k, path in files.items()})


def _record(writer: RecordWriter, split: str, shard: int) -> Path:
    """The file that says what became of a shard's files."""
    return writer.work / f"report-{split}-{shard:05d}.json"


def _write(writer, split, shard, files, events, advance) -> None:
    record = _record(writer, split, shard)
    examples = _examples(events, split, files, record, advance)
    # What a clip without anything beside it has of the features that say so.
    blank = {"guide": b"", "has_guide": False, "camera": "", "has_camera": False}
    lacking = {name: x for name, x in blank.items() if name in writer.features}
    writer.write_shard(split, shard, ({**lacking, **x} for x in examples))


def _fill(writer, plan, prepare, workers, timeout, advance) -> list[Entry]:
    """Writes the shards that are missing; returns the entries of all files."""
    entries = [
        describe_file(item.key, None, [{"reason": reason, "detail": detail}])
        for item, reason, detail in plan.refused
    ]
    for entry in entries:
        advance(entry)
    left = [files for at, files in plan.shards.items() if not writer.is_done(*at)]
    items = [*itertools.chain.from_iterable(left)]
    workers = min(workers or os.cpu_count() or 1, len(items))
    events = supervise(prepare, items, workers=workers, timeout=timeout)
    with contextlib.closing(events):
        for at, files in plan.shards.items():
            done = writer.is_done(*at)
            if not done:
                _write(writer, *at, files, events, advance)
            found = read_json(_record(writer, *at), _REMAKE, list[Entry])
            for entry in found if done else ():
                advance(entry)
            entries += found
    return entries


def _examples(events, split, files, record, advance) -> Iterator[Mapping[str, Any]]:
    """Yields the examples of a shard's files, and then writes down what they gave."""
    entries = []
    for item in files:
        outcomes = []
        for event in events:
            if event.kind == "end":
                break
            if event.kind != "result":
                reason = "failed" if event.kind == "error" else event.kind
                outcomes.append({"reason": reason, "detail": event.value})
                break
            outcomes.append({k: v for k, v in event.value.items() if k != "clip"})
            if "clip" in event.value:
                yield event.value["clip"]
        entries.append(describe_file(item.key, split, outcomes))
        advance(entries[-1])
    write_atomically(record, json.dumps(entries).encode())


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Entry], None]]:
    """Shows how far the work is; yields what is to be called for every file."""
    bar = Bars("{task.fields[clips]} clips, {task.fields[skipped]} skipped")
    taken = skipped = 0
    with bar:
        task = bar.add_task("files", total=total, clips=0, skipped=0)

        def advance(entry: Entry) -> None:
            nonlocal taken, skipped
            taken += entry["clips"]
            skipped += not entry["clips"]
            bar.update(task, advance=1, clips=taken, skipped=skipped)

        yield advance
