"""What reports on autoencoders of every kind of data share: pairs, measures, files."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jvdit.data.clips import BadClip, Clip, Source
from jvdit.evaluation import oracle, report
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import write_json
from jvdit.machine.progress import Bars

_CHUNK = 8  # clips that are read together
_LEAST_HEIGHT = 96  # pixels; smaller clips are enlarged

Scores = Mapping[str, Mapping[str, report.Interval]]


class Pair(NamedTuple):
    """What an autoencoder was given of a clip, and what it made of it.

    Attributes:
        clip: the whole clip.
        index: which one of its source it is.
    """

    original: np.ndarray
    decoded: np.ndarray
    clip: Clip
    index: int


class Pairs(NamedTuple):
    """Reconstructions of a source's clips.

    Attributes:
        good: those that could be read.
        bad: the others, each with the reason, as JSON values.
    """

    good: list[Pair]
    bad: list[dict[str, Any]]


def reconstructions(
    source: Source,
    name: str,
    count: int,
    run: Callable[[Clip], tuple[np.ndarray, np.ndarray] | BadClip],
) -> Pairs:
    """Reconstructs the first clips of a source.

    Args:
        source: the clips.
        name: its name, for the error.
        count: most clips to use.
        run: returns the original and the reconstruction of a clip.

    Raises:
        ValueError: none of the clips can be used.
    """
    count = min(count, len(source))
    pairs = Pairs([], [])
    with Bars() as progress:
        task = progress.add_task("reconstructing", total=count)
        for start in range(0, count, _CHUNK):
            ids = range(start, min(start + _CHUNK, count))
            for i, clip in zip(ids, source.read(ids), strict=True):
                found = clip if isinstance(clip, BadClip) else run(clip)
                if isinstance(found, BadClip):
                    pairs.bad.append({"clip": i, "reason": found.reason})
                else:
                    pairs.good.append(Pair(*found, clip, i))
            progress.advance(task, len(ids))
    if not pairs.good:
        raise ValueError(
            f"none of the {count} clips of {name} can be used: {pairs.bad[:1]}."
        )
    return pairs


def measured(
    pairs: Pairs, measures: Mapping[str, Callable[[np.ndarray, np.ndarray], Any]]
) -> dict[str, np.ndarray]:
    """Each measure of each reconstruction against its original."""
    return {
        name: np.array([float(measure(x.decoded, x.original)) for x in pairs.good])
        for name, measure in measures.items()
    }


def enlarged(film: np.ndarray) -> np.ndarray:
    """A clip [T H W 3] by a whole factor as large as it can be looked at."""
    factor = max(1, -(-_LEAST_HEIGHT // film.shape[1]))
    return film.repeat(factor, 1).repeat(factor, 2)


def examples(
    pairs: Pairs,
    found: Mapping[str, np.ndarray],
    by: str,
    figure: Callable[[Pair, str], str],
) -> list[str]:
    """The best, median and worst clips.

    Args:
        pairs: the reconstructions.
        found: their measures.
        by: the measure that they are ordered by; higher is better.
        figure: makes a figure of a pair and a line with its measures.
    """
    parts = []
    for title, ids in report.examples(found[by]).items():
        told = [", ".join(f"{k} {v[i]:.3g}" for k, v in found.items()) for i in ids]
        chosen = [pairs.good[i] for i in ids]
        parts.append(report.films(title, [*map(figure, chosen, told)]))
    return parts


def write_report(
    out: pathlib.Path,
    folder: str,
    name: str,
    pairs: Pairs,
    found: Mapping[str, np.ndarray],
    meaning: Mapping[str, str],
    scores: Scores | None,
    figures: Sequence[str],
) -> list[pathlib.Path]:
    """Writes report.json and report.html, and returns their paths.

    Args:
        out: folder for the report.
        folder: the autoencoder's folder, which the report names.
        name: name of the source.
        pairs: the reconstructions.
        found: their measures.
        meaning: of each measure, in a few words.
        scores: what the oracle says of "real" clips and of others, by their names;
            None: the clips aren't the procedural world's.
        figures: the examples.
    """
    means = oracle.summary(found)
    results = {"vae": folder, "data": name, "clips": len(pairs.good), "bad": pairs.bad}
    results |= {"measures": means}
    rows = [
        [f"{k} <small>{meaning[k]}</small>", report.number(v)] for k, v in means.items()
    ]
    parts = [report.section(name, report.table(["", folder], rows))]
    if scores is not None:
        results |= {"oracle": scores}
        others = {k: v for k, v in scores.items() if k != "real"}
        seen = report.score_table(scores["real"], others)
        parts.append(report.section("What the oracle sees", seen))
    parts.append(report.section("Clips", *figures))
    write_json(out / "report.json", results)
    title = f"{len(pairs.good)} clips through {folder}"
    write_atomically(out / "report.html", report.page(title, parts).encode())
    return [out / "report.json", out / "report.html"]
