"""What became of every file that was to be ingested: `report.json` and `report.md`."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jvdit.data.ingest.clip_file import NO_CAPTION
from jvdit.data.media.media_error import REASONS
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json
from jvdit.machine.text_files import printable

ASIDE = ("other", "unlisted")  # reasons of files that were hardly meant
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
        meant = [entry for entry in self.files if entry["reason"] not in ASIDE]
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
        taken = len(self.files) - len(self.skipped)
        told = f"{self.clips} clips of {taken} files; {len(self.skipped)} files skipped"
        told += f" ({why})" if why else ""
        return told + (f"; {bare} clips have no caption{where}" if bare else "")

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
            [e["file"], e["split"], e["clips"], ", ".join(e["notes"])]
            + [f"{e['dropped']}: {e['reason']} ({e['detail']})" * (e["dropped"] > 0)]
            for e in self.files
            if e["clips"]
        ]
        if rows:
            heads = ["file", "split", "clips", "changed", "windows dropped"]
            lines += _table("Taken", heads, rows)
        lines += ["", "## Recipe", ""]
        lines += [f"- {name}: {value}" for name, value in self.recipe.items()]
        return "\n".join(lines) + "\n"


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
