"""Audits data sets of clips: a card for people, and JSON for programs.

    python tools/audit_dataset.py data/clips 'data/clips#val' --out audit
    python tools/audit_dataset.py world:train:9x32x32@8:2000 --flag_lists people,my.txt

Several sources are compared with one another: what is in two splits is found. Captions
are searched for the words of lists, each a text file with a word or a phrase a line;
those of tools/flag_lists may be edited, or named in the flag beside files of one's own.
"""

import html
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from jvdit.data.sheets import contact_sheet
from jvdit.data.sources import open_source
from jvdit.evaluation import report
from jvdit.evaluation.audit import Audit, audit, doubles, spread
from jvdit.evaluation.flag_lists import find_lists, read_lists
from jvdit.machine import flag_parser
from jvdit.machine.command import told_in_a_line
from jvdit.machine.files import check_writable, write_atomically

_OUT = flags.DEFINE_string("out", "audit", "Folder for audit.html and audit.json.")
_N = flags.DEFINE_integer("n", 2000, "Clips to read of each source.", lower_bound=1)
_LISTS = flags.DEFINE_list(
    "flag_lists",
    None,
    "Text files of words to flag in captions, or names of those in tools/flag_lists "
    "(default: all of those).",
)
_RATE = flags.DEFINE_integer("audio_rate", 16_000, "Hz at which sound is read; 0: not.")
_SHOWN, _LISTED = 6, 200
_LIMITS = (
    "Every number but clips, hours, sizes and rates is of the clips that were read. "
    "Still, black, cut and silent are thresholds, not judgements: look at what is "
    "listed before you leave it out. Doubles are found by small pictures of them, so "
    "crops and mirrored clips are missed, and one that hardly differs is taken for "
    "another. Captions are read word by word: a word that is denied counts, a synonym, "
    "a plural or another spelling that isn't in a list doesn't, and of scripts without "
    "spaces only whole runs are found. The lists are short, mostly English, and their "
    "makers' choice; that nothing of them is named doesn't show that nothing is to be "
    "seen. Licences, consent, faces and what isn't in the captions are not looked at."
)
_SHIPPED = pathlib.Path(__file__).with_name("flag_lists")


def card(parts: Sequence[Audit], found: Sequence, sheets: Sequence[str]) -> str:
    """The card, as HTML."""
    rows = [
        [html.escape(x.name), str(x.clips), f"{x.seconds / 3600:.2f}", str(x.read)]
        + [str(sum(x.faults.values())), str(x.captions["empty"])]
        + [str(len(x.flagged.get(name, ()))) for name in _FLAGS]
        for x in parts
    ]
    head = ["source", "clips", "hours", "read", "unreadable", "no caption", *_FLAGS]
    body = [report.section("What there is", report.table(head, rows), *sheets)]
    body.append(report.section("Doubles", _doubles(found)))
    for part in parts:
        body.append(report.section(part.name, *_details(part)))
    body.append(report.section("Limits", f"<p>{_LIMITS}</p>"))
    return report.page("Audit of clips", body)


_FLAGS = ("still", "black", "cut", "silent", "clipped")


def _doubles(found: Sequence) -> str:
    across = sum(a != b for a, _, b, *_ in found)
    told = f"{len(found)} pairs of clips look alike, {across} of them across sources."
    rows = [
        [html.escape(f"{a} {i}"), html.escape(f"{b} {j}"), f"{alike:.3f}"]
        for a, i, b, j, alike in found[:20]
    ]
    return f"<p>{told}</p>" + (
        report.table(["clip", "and", "correlation"], rows) if rows else ""
    )


def _details(part: Audit) -> list[str]:
    captions = part.captions
    words = captions["words"]
    found = [
        f"<p>Captions: {captions['different']} different ones, of {words['least']} to "
        f"{words['most']} words (median {words['median']:g}), with "
        f"{captions['vocabulary']} different words.</p>",
        _counts("size", part.sizes),
        _counts("frames per second", part.rates),
        _counts("word", captions["most frequent"]),
    ]
    if part.faults:
        found.append(_counts("why it can't be read", part.faults))
    rows = [
        [
            html.escape(name),
            str(len(x.clips)),
            f"{x.share:.1%}",
            html.escape(
                ", ".join(f"{w} {n}" for w, n in _most_first(x.words)) or "none"
            ),
            "" if (even := _evenness(x.words)) is None else f"{even:.2f}",
        ]
        for name, x in part.lists.items()
    ]
    head = ["list", "captions", "share", "words that they name", "evenness"]
    found.append(report.table(head, rows))
    for what, counts in part.together.items():
        if counts:
            found.append(_counts(f"{what} named together", counts))
    return found


def _most_first(words: dict[str, int]) -> list[tuple[str, int]]:
    """The words that are named, the most frequent first."""
    return sorted(((w, n) for w, n in words.items() if n), key=lambda x: -x[1])


def _evenness(words: dict[str, int]) -> float | None:
    """How evenly words are named; None (JSON has no NaN): none is, or it has one."""
    found = spread(np.array([*words.values()]))
    return None if math.isnan(found) else found


def _counts(name: str, counts: dict[str, int], most: int = 12) -> str:
    rows = [[html.escape(str(k)), str(n)] for k, n in list(counts.items())[:most]]
    if len(counts) > most:
        rows.append([f"{len(counts) - most} more", ""])
    return report.table([name, "clips"], rows)


def main(argv: Sequence[str]) -> None:
    """Reads the sources, and writes the card."""
    with told_in_a_line("stopped"):
        if len(argv) < 2:
            raise ValueError("name the sources to audit, such as data/clips.")
        lists = read_lists(find_lists(_LISTS.value, _SHIPPED))
        out = pathlib.Path(_OUT.value)
        check_writable(out)
        sources = {name: open_source(name, audio_rate=_RATE.value) for name in argv[1:]}
        for name, source in sources.items():
            if hasattr(source, "settings"):
                raise ValueError(f"{name} holds latents; audit the clips they are of.")
        parts = [audit(name, x, _N.value, lists) for name, x in sources.items()]
        found = doubles(parts)
        sheets = []
        for part in parts:
            for flag, ids in part.flagged.items():
                clips = sources[part.name].read(ids[:_SHOWN])
                videos = [x["video"] for x in clips if isinstance(x, dict)]
                sheet = contact_sheet(
                    videos, [f"{flag}: {part.name} {i}" for i in ids[: len(videos)]]
                )
                sheets.append(report.picture(sheet))
        data = [_as_json(part) for part in parts]
        told = {"sources": data, "doubles": found[:_LISTED], "limits": _LIMITS}
        write_atomically(out / "audit.json", json.dumps(told, indent=1).encode())
        write_atomically(out / "audit.html", card(parts, found, sheets).encode())
    print(out / "audit.html")


def _as_json(part: Audit) -> dict:
    fields = {k: x for k, x in vars(part).items() if k != "codes"}
    return fields | {
        "lists": {
            name: x._asdict() | {"evenness": _evenness(x.words)}
            for name, x in part.lists.items()
        }
    }


if __name__ == "__main__":
    flag_parser.run(main)
