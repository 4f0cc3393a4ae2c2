"""Videos to a data set of clips: in parallel, supervised, resumable.

The unit of work is a shard, which is a fixed group of source files: a job that was
killed repeats the shard it was at and nothing else, and the result is the same to the
byte. What a file holds decides its split, so no picture of it is in two of them.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from jvdit.data.ingest.beam import Engine
from jvdit.data.ingest.clip_file import NO_CAPTION, ClipFile, Recipe, prepare_file
from jvdit.data.ingest.listing import list_items
from jvdit.data.ingest.supervisor import supervise
from jvdit.data.media.reader import REASONS
from jvdit.data.records import RecordWriter, clip_features
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json
from jvdit.machine.progress import Bars
from jvdit.machine.text_files import printable

_ASIDE = ("other", "unlisted")  # reasons of files that were hardly meant
_ROWS = 500  # of a table in the readable report; report.json has all


class Entry(TypedDict):
    """What became of a file; see `describe_file`."""

    file: str
    split: str | None
    clips: int
    dropped: int
    reason: str | None
    detail: str | None
    notes: list[str]


def describe_file(
    key: str, split: str | None, outcomes: Sequence[Mapping[str, Any]]
) -> Entry:
    """Sums up what came of the windows of one file.

    Args:
        key: the file's name.
        split: the split it belongs to; None if it was refused before.
        outcomes: for every window taken {"notes": [str]}, for every other one
            {"reason", "detail"}.

    Returns:
        The file's entry in the report: `clips` counts the windows taken; `reason` and
        `detail` say why the first one that was not taken was not, and `dropped` how
        many they were.
    """
    refused = [o for o in outcomes if "reason" in o]
    notes = collections.Counter(n for o in outcomes for n in o.get("notes", ()))
    return {
        "file": key,
        "split": split,
        "clips": len(outcomes) - len(refused),
        "dropped": len(refused),
        "reason": refused[0]["reason"] if refused else None,
        "detail": printable(refused[0]["detail"]) if refused else None,
        "notes": list(notes),
    }


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every file.

    Attributes:
        files: one entry for each; see `describe_file`.
        recipe: how clips were cut.
    """

    files: list[Entry]
    recipe: dict[str, Any]

    @property
    def clips(self) -> int:
        """Number of clips taken."""
        return sum(entry["clips"] for entry in self.files)

    @property
    def skipped(self) -> list[Entry]:
        """The files that gave no clip."""
        return [entry for entry in self.files if not entry["clips"]]

    @property
    def reject_rate(self) -> float:
        """Share of the files that gave no clip, of those that were meant to."""
        meant = [entry for entry in self.files if entry["reason"] not in _ASIDE]
        return sum(not entry["clips"] for entry in meant) / max(1, len(meant))

    @property
    def uncaptioned(self) -> tuple[int, list[str]]:
        """Number of clips without a caption, and where one was looked for."""
        notes = [(e["clips"], n) for e in self.files for n in e["notes"]]
        bare = [(clips, n) for clips, n in notes if n.startswith(NO_CAPTION)]
        places = [n.removeprefix(NO_CAPTION).strip(" ()") for _, n in bare]
        return sum(clips for clips, _ in bare), [*dict.fromkeys(filter(None, places))]

    @property
    def reasons(self) -> dict[str, int]:
        """Number of skipped files by reason, the most frequent first."""
        counted = collections.Counter(str(entry["reason"]) for entry in self.skipped)
        return dict(counted.most_common())

    def summary(self) -> str:
        """Says it in one line."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.reasons.items())
        bare, places = self.uncaptioned
        where = f" ({'; '.join(places[:4])})" if places else ""
        return (
            f"{self.clips} clips of {len(self.files) - len(self.skipped)} files; "
            f"{len(self.skipped)} files skipped" + (f" ({why})" if why else "")
        ) + (f"; {bare} clips have no caption{where}" if bare else "")

    def write(self, directory: Path) -> None:
        """Writes `report.json` and `report.md`."""
        data = {"recipe": self.recipe, "clips": self.clips, "reasons": self.reasons}
        data |= {"without_caption": self.uncaptioned[0], "files": self.files}
        write_atomically(directory / "report.json", json.dumps(data, indent=1).encode())
        write_atomically(directory / "report.md", self.markdown().encode())

    @classmethod
    def read(cls, directory: Path) -> "Report":
        """Reads the report of a data set."""
        return read_json(directory / "report.json", "make the data set anew", cls)

    def markdown(self) -> str:
        """Returns the report to be read."""
        splits = collections.Counter()
        for entry in self.files:
            splits[entry["split"]] += entry["clips"]
        lines = ["# Ingest", "", self.summary() + ".", ""]
        lines += [f"- {split}: {n} clips" for split, n in splits.items() if n]
        if self.skipped:
            counts = [[r, n, REASONS[r]] for r, n in self.reasons.items()]
            lines += _table("Skipped, by reason", ["reason", "files", "it"], counts)
            rows = [[e["file"], e["reason"], e["detail"]] for e in self.skipped]
            lines += _table("Skipped", ["file", "reason", "detail"], rows)
        rows = [
            [e["file"], e["split"], e["clips"], ", ".join(e["notes"]), _dropped(e)]
            for e in self.files
            if e["clips"]
        ]
        if rows:
            heads = ["file", "split", "clips", "changed", "windows dropped"]
            lines += _table("Taken", heads, rows)
        lines += ["", "## Recipe", ""]
        lines += [f"- {name}: {value}" for name, value in self.recipe.items()]
        return "\n".join(lines) + "\n"


def _dropped(entry: Entry) -> str:
    """Says how many windows of a file were not taken, and why the first was not."""
    if not entry["dropped"]:
        return ""
    return f"{entry['dropped']}: {entry['reason']} ({entry['detail']})"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    """Returns the lines of a titled markdown table."""
    lines = ["", f"## {title}", "", _row(heads), _row(["---"] * len(heads))]
    lines += [_row(row) for row in rows[:_ROWS]]
    if len(rows) > _ROWS:
        lines += ["", f"{len(rows) - _ROWS} more rows are in report.json."]
    return lines


def _row(cells: Sequence) -> str:
    texts = [" ".join(str(c).split()).replace("|", "\\|") for c in cells]
    return f"| {' | '.join(texts)} |"


_REMAKE = "remove the data set and make it again"
_SAMPLE = 2**20  # bytes hashed at either end of a file


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which files go into which shard, and which into none.

    Attributes:
        shards: items by (split, shard).
        refused: (item, reason, detail) of the files that are not even tried.
        digest: hash of all of it: a resumed job must find the same.
    """

    shards: Mapping[tuple[str, int], list[ClipFile]]
    refused: list[tuple[ClipFile, str, str]]
    digest: str


def file_digest(path: str) -> str | None:
    """Returns a hash of a file's size, first and last megabyte; None if unreadable.

    A name with a NUL, or with half a character in it, is that of no file.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little") + file.read(_SAMPLE))
            file.seek(max(_SAMPLE, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def plan_shards(
    items: Sequence[ClipFile], *, val_fraction: float | int, shard_size: int
) -> Plan:
    """Assigns every file to a split, by its content, and to a shard.

    What is missing, or has a copy with the same caption, is refused.

    Args:
        items: the files, and what was found in the place of one.
        val_fraction: share of them, about, that goes to "val"; the rest to "train".
        shard_size: files of a shard.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"`val_fraction` (={val_fraction}) must be in [0, 1).")
    if shard_size < 1:
        raise ValueError(f"`shard_size` (={shard_size}) must be positive.")
    refused = [(item, item.reason, item.detail) for item in items if item.reason]
    items, seen = [item for item in items if not item.reason], {}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        digests = list(pool.map(file_digest, [item.path for item in items]))
        # Of what lies beside them, which most have not.
        more = [[*map(file_digest, item.beside.values())] for item in items]
    by_split = {"train": [], "val": []}
    for item, digest, others in zip(items, digests, more, strict=True):
        if digest is None or None in others:
            files = (item.path, *item.beside.values())
            lost = files[[digest, *others].index(None)]
            refused.append((item, "missing", lost))
        elif (
            other := seen.setdefault((digest, item.caption, *others), item)
        ) is not item:
            refused.append((item, "duplicate", f"of {other.key}"))
        else:
            held_out = int(digest[:8], 16) < val_fraction * 2**32
            by_split["val" if held_out else "train"].append(item)
    shards = {
        (split, start // shard_size): members[start : start + shard_size]
        for split, members in by_split.items()
        for start in range(0, len(members), shard_size)
    }
    names = [[item.key, item.caption] for item in items]
    beside = [[*x.beside, *y] for x, y in zip(items, more, strict=True)]
    told = [beside] if any(beside) else []
    identity = json.dumps([names, digests, val_fraction, shard_size, *told])
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return Plan(shards, refused, digest)


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
    with Bars() as bars:
        bars.add_task(f"listing {', '.join(map(str, inputs))}", total=None)
        items = list_items(inputs, root=root)
        listed(items)
        plan = plan_shards(items, val_fraction=val_fraction, shard_size=shard_size)
    meant = sum(item.reason not in _ASIDE for item in items)
    if not plan.shards:
        raise ValueError(
            f"None of the {meant} videos can be read; the first, "
            f"{plan.refused[0][0].key}: {printable(' '.join(plan.refused[0][1:]))}."
        )
    settings = {"recipe": dataclasses.asdict(recipe), "files": plan.digest}
    shards = collections.Counter(split for split, _ in plan.shards)
    beside = {
        name for files in plan.shards.values() for x in files for name in x.beside
    }
    writer = RecordWriter(
        out,
        clip_features(sorted(beside)),
        shards=shards,
        settings=settings,
        overwrite=overwrite,
    )
    if writer.finished:
        return Report.read(writer.path)
    prepare = functools.partial(work, recipe=recipe)
    with writer.alone(), _progress(len(items)) as advance:
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


class Job(NamedTuple):
    """A shard to be prepared, wherever: what its writer is made of, and its files."""

    path: str
    features: dict[str, str]
    shards: dict[str, int]
    settings: dict[str, Any]
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
    writer = RecordWriter(
        job.path, job.features, shards=job.shards, settings=job.settings
    )
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
        Job(
            path,
            writer.features,
            writer.shards,
            writer.plan.settings,
            *at,
            _absolute(files),
        )
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


def _absolute(files: Sequence[ClipFile]) -> list[ClipFile]:
    return [
        item._replace(
            path=os.path.abspath(item.path),
            **{name: os.path.abspath(path) for name, path in item.beside.items()},
        )
        for item in files
    ]


def _record(writer: RecordWriter, split: str, shard: int) -> Path:
    """The file that says what became of a shard's files."""
    return writer.work / f"report-{split}-{shard:05d}.json"


def _write(writer, split, shard, files, events, advance) -> None:
    record = _record(writer, split, shard)
    examples = _examples(events, split, files, record, advance)
    examples = ({**_lacking(writer.features), **example} for example in examples)
    writer.write_shard(split, shard, examples)


def _lacking(features: Mapping[str, str]) -> dict[str, Any]:
    """What a clip without anything beside it has of the features that say so."""
    blank = {"guide": b"", "has_guide": False, "camera": "", "has_camera": False}
    return {name: value for name, value in blank.items() if name in features}


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
