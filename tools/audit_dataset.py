"""Audits data sets of clips: a card for people, and JSON for programs.

    python tools/audit_dataset.py data/clips 'data/clips#val' --out audit
    python tools/audit_dataset.py world:train:9x32x32@8:2000 --terms terms.txt

Several sources are compared with one another: what is in two splits is found. A file of
terms has a line for each group of words whose balance is to be seen, `animals: dog,
cat`; without one there are a few of people, places and animals.
"""

import html
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from jvdit.data.sheets import contact_sheet
from jvdit.data.sources import open_source
from jvdit.evaluation import report
from jvdit.evaluation.audit import TERMS, Audit, audit, doubles, read_terms, spread
from jvdit.machine import flag_parser
from jvdit.machine.command import told_in_a_line
from jvdit.machine.files import check_writable, write_atomically
from jvdit.machine.text_files import read_text

_OUT = flags.DEFINE_string("out", "audit", "Folder for audit.html and audit.json.")
_N = flags.DEFINE_integer("n", 2000, "Clips to read of each source.", lower_bound=1)
_TERMS = flags.DEFINE_string("terms", None, "File of groups of words to count.")
_RATE = flags.DEFINE_integer("audio_rate", 16_000, "Hz at which sound is read; 0: not.")
_SHOWN, _LISTED = 6, 200
_LIMITS = (
    "Every number but clips, hours, sizes and rates is of the clips that were read. "
    "Still, black, cut and silent are thresholds, not judgements: look at what is "
    "listed before you leave it out. Doubles are found by small pictures of them, so "
    "crops and mirrored clips are missed, and one that hardly differs is taken for "
    "another. Captions are read word by word: a word that is denied counts, and a "
    "synonym doesn't. Licences, consent, faces and what isn't in the captions are not "
    "looked at."
)


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
        [group, ", ".join(f"{w} {n}" for w, n in counts.items() if n) or "none"]
        + [f"{spread(np.array([*counts.values()])):.2f}"]
        for group, counts in part.terms.items()
    ]
    found.append(report.table(["group", "captions that name it", "evenness"], rows))
    if part.together:
        found.append(_counts("named together", part.together))
    return found


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
        terms = read_terms(read_text(_TERMS.value)) if _TERMS.value else TERMS
        out = pathlib.Path(_OUT.value)
        check_writable(out)
        sources = {name: open_source(name, audio_rate=_RATE.value) for name in argv[1:]}
        for name, source in sources.items():
            if hasattr(source, "settings"):
                raise ValueError(f"{name} holds latents; audit the clips they are of.")
        parts = [audit(name, x, _N.value, terms) for name, x in sources.items()]
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
        "evenness": {
            group: spread(np.array([*counts.values()]))
            for group, counts in part.terms.items()
        }
    }


if __name__ == "__main__":
    flag_parser.run(main)
