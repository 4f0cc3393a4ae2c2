"""What reports on autoencoders of every kind of data share: pairs, measures, files."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jvdit.data.clips import BadClip, Clip, Source
from jvdit.evaluation import oracle, report
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
    least: int = 1,
) -> Pairs:
    """Reconstructs the first clips of a source.

    Args:
        source: the clips.
        name: its name, for the error.
        count: most clips to use.
        run: returns the original and the reconstruction of a clip.
        least: how many are needed.

    Raises:
        ValueError: too few of the clips can be used.
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
    if len(pairs.good) < least:
        raise ValueError(
            f"{len(pairs.good) or 'none'} of the {count} clips of {name} can be used, "
            f"and {least} must be: {pairs.bad[:1]}."
        )
    return pairs


class Measure(NamedTuple):
    """A measure of reconstructions.

    Attributes:
        of: its value for a reconstruction and its original.
        meaning: in a few words.
    """

    of: Callable[[np.ndarray, np.ndarray], Any]
    meaning: str


Measures = Mapping[str, Measure]


def measured(pairs: Pairs, measures: Measures) -> dict[str, np.ndarray]:
    """Each measure of each reconstruction against its original."""
    return {
        name: np.array([float(measure.of(x.decoded, x.original)) for x in pairs.good])
        for name, measure in measures.items()
    }


def measures_table(
    head: str, means: Mapping[str, report.Interval], measures: Measures
) -> str:
    """A table of the mean of each measure, under a head."""
    rows = [
        [f"{name} <small>{measures[name].meaning}</small>", report.number(mean)]
        for name, mean in means.items()
    ]
    return report.table(["", head], rows)


def enlarged(film: np.ndarray) -> np.ndarray:
    """A clip [T H W 3] by a whole factor as large as it can be looked at."""
    factor = max(1, -(-_LEAST_HEIGHT // film.shape[1]))
    return film.repeat(factor, 1).repeat(factor, 2)


def write_report(
    out: pathlib.Path,
    folder: str,
    name: str,
    pairs: Pairs,
    measures: Measures,
    scores: Scores | None,
    figure: Callable[[Pair, str], str],
) -> list[pathlib.Path]:
    """Measures reconstructions, writes report.json and report.html, returns the paths.

    Args:
        out: folder for the report.
        folder: the autoencoder's folder, which the report names.
        name: name of the source.
        pairs: the reconstructions.
        measures: of them; higher is better of the first, which tells the examples: the
            best, median and worst clips.
        scores: what the oracle says of "real" clips and of others, by their names;
            None: the clips aren't the procedural world's.
        figure: makes a figure of a pair and a line with its measures.
    """
    found = measured(pairs, measures)
    means = oracle.summary(found)
    results = {"vae": folder, "data": name, "clips": len(pairs.good), "bad": pairs.bad}
    results |= {"measures": means}
    parts = [report.section(name, measures_table(folder, means, measures))]
    if scores is not None:
        results |= {"oracle": scores}
        others = {k: v for k, v in scores.items() if k != "real"}
        seen = report.score_table(scores["real"], others)
        parts.append(report.section("What the oracle sees", seen))
    films = []
    for title, ids in report.examples(found[next(iter(measures))]).items():
        told = [", ".join(f"{k} {v[i]:.3g}" for k, v in found.items()) for i in ids]
        chosen = [pairs.good[i] for i in ids]
        films.append(report.films(title, [*map(figure, chosen, told)]))
    parts.append(report.section("Clips", *films))
    title = f"{len(pairs.good)} clips through {folder}"
    return report.write(out, results, title, parts)
