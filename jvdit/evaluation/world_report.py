"""The report on models of the procedural world, with real clips for comparison."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvdit.data.spectrum import spectrogram
from jvdit.data.world import World
from jvdit.evaluation import distance, report
from jvdit.evaluation.breakdown import NAMES, breakdown, composition
from jvdit.evaluation.measuring import Measured, chunks, met_in_training, neighbours
from jvdit.evaluation.oracle import observe, summary
from jvdit.evaluation.oracle.adherence import describe
from jvdit.evaluation.overlay import overlay
from jvdit.machine.energy import Energy

_ASIDE, _REAL = 1_000_000, 512  # first and number of the other real clips
_SHOWN = tuple(f"oracle/{n}" for n in ("all", "color", "shape", "direction"))
# The metrics of a training: (step, value) pairs by name.
History = Mapping[str, Sequence[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class ReportColumn:
    """One column of the report: clips of one model with one set of sampling settings.

    Attributes:
        label: name of the model.
        how: the sampling settings, a dataclass; its fields go into the report, and its
            `str` into the column's name.
        world: the world whose prompts the clips were generated from.
        measured: the clips and their scores.
        trained: the worlds that the model was trained on, from `trained_on`.
        energy: of each clip on average; None: unknown.
    """

    label: str
    how: Any
    world: World
    measured: Measured
    trained: tuple[tuple[World, int], ...] = ()
    energy: Energy | None = None

    @property
    def name(self) -> str:
        """The name of the column: the model and its sampling settings."""
        return f"{self.label}: {self.how}"


def results_of(
    columns: Sequence[ReportColumn], bounds: Mapping[World, Measured]
) -> list[dict[str, Any]]:
    """The contents of the report as JSON values, one dictionary for each column.

    Args:
        columns: the columns of the report.
        bounds: the measured real clips of each world, to compare with.
    """
    results = []
    for column in columns:
        world, measured, bound = column.world, column.measured, bounds[column.world]
        ids = np.arange(len(measured.clips.videos))
        scenes, captions = world.scenes(ids), world.captions(ids)
        met = met_in_training(captions, column.trained)
        known = neighbours(world, column.trained)
        results.append(
            {
                "workdir": column.label,
                "world": dataclasses.asdict(world),
                **dataclasses.asdict(column.how),
                "energy": column.energy and column.energy.told,
                "met_in_training": int(met.sum()) if column.trained else None,
                "scores": measured.summary,
                "real": bound.summary,
                "controls": {
                    name: summary(found) for name, found in measured.controls.items()
                },
                "parts": breakdown(measured.scores, scenes),
                "real_parts": breakdown(bound.scores, scenes),
                "confusions": {
                    name: {"words": words, "told_seen": counts.tolist()}
                    for name, (words, counts) in measured.confusions.items()
                },
                "sets": _as_sets(column, bound, known),
                "clips": [
                    {"prompt": caption, "met_in_training": bool(each)}
                    | {k: _json(v[i]) for k, v in measured.scores.items()}
                    for i, (caption, each) in enumerate(zip(captions, met, strict=True))
                ],
            }
        )
    return results


def _as_sets(
    column: ReportColumn, bound: Measured, known: tuple[np.ndarray, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Measures of the clips as a set ("clips"), and of other real clips ("real").

    The latter have scenes that nobody was trained on and that nothing is compared with.
    """
    count, world = min(len(bound.clips.videos), _REAL), column.world
    other = np.concatenate([world.videos(ids + _ASIDE) for ids in chunks(count)])
    sets = {
        "clips": (column.measured.thumbnails, column.measured.features),
        "real": (distance.variants(other), distance.random_features(other)),
    }
    return {
        name: distance.memorisation(thumbnails, *known)
        | {"frechet": distance.frechet_distance(features, bound.features)}
        for name, (thumbnails, features) in sets.items()
    }


def compositions(columns: Sequence[ReportColumn]) -> dict[str, dict[str, float | None]]:
    """What "comp" costs over "test", of each model that was evaluated on both."""
    found: dict[str, dict[str, float | None]] = {}
    for new, old in itertools.product(columns, columns):
        same = (new.label, new.how) == (old.label, old.how)
        if not same or (new.world.split, old.world.split) != ("comp", "test"):
            continue
        ids = np.arange(len(new.measured.clips.videos))
        scenes, known_scenes = new.world.scenes(ids), old.world.scenes(ids)
        scores, known = new.measured.scores, old.measured.scores
        found[new.name] = {
            name: _json(composition(scores[name], scenes, known[name], known_scenes))
            for name in NAMES
        }
    return found


def _json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def sections(
    results: Sequence[Mapping[str, Any]],
    columns: Sequence[ReportColumn],
    bounds: Mapping[World, Measured],
    histories: Mapping[str, History],
) -> list[str]:
    """Builds the sections of the report: tables, plots, and example clips, as HTML.

    Args:
        results: the report's contents, from `results_of`.
        columns: the columns of the report.
        bounds: the measured real clips of each world, to compare with.
        histories: the metrics of each model's training, by its label.
    """
    parts = []
    for world, bound in bounds.items():
        scores = {x.name: x.measured.summary for x in columns if x.world == world}
        size = f"{world.frames} x {world.height} x {world.width} at {world.fps:g} fps"
        table = report.score_table(bound.summary, scores, bound.counts)
        parts.append(report.section(f"{world.split}, {size}", table))
    if told := [[x.name, str(x.energy)] for x in columns if x.energy]:
        parts.append(report.section("Energy", report.table(["", "a clip"], told)))
    if found := compositions(columns):
        rows = [
            [k, *("–" if v[x] is None else f"{v[x]:+.2f}" for x in NAMES)]
            for k, v in found.items()
        ]
        table = report.table(["comp minus test", *NAMES], rows)
        parts.append(report.section("New combinations", table))
    rows = []
    for column, found in zip(columns, results, strict=True):
        table = report.parts_table(found["real_parts"], found["parts"])
        parts += _sound(column, bounds[column.world])
        parts.append(report.section(f"By content: {column.name}", table))
        tables = [
            report.confusion_table(np.array(each["told_seen"]), each["words"])
            for each in found["confusions"].values()
        ]
        folded = f"<details><summary>Confusions</summary>{''.join(tables)}</details>"
        parts.append(folded)
        met = found["met_in_training"]
        for who, measures in found["sets"].items():
            numbers = [measures[name] for name in ("copies", "authentic", "frechet")]
            label = column.name if who == "clips" else "other real clips"
            told = "" if who == "real" else "–" if met is None else str(met)
            rows.append([label, told, *(f"{number:.4f}" for number in numbers)])
    head = ["", "prompts met in training", "copies", "authentic", "Fréchet"]
    parts.append(report.section("As a set", report.table(head, rows)))
    plots = "".join(_plots(results) + _histories(histories))
    parts.append(report.section("Plots", f"<div class=plots>{plots}</div>"))
    for column in {x.label: x for x in reversed(columns)}.values():
        clips = _examples(column.measured, column.world)
        parts.append(report.section(column.name, *clips))
    return parts


def _sound(column: ReportColumn, bound: Measured) -> list[str]:
    """What is heard of the clips, and would be if they had another sound."""
    measured = column.measured
    if not measured.controls:
        return []
    wrong = {name: summary(found) for name, found in measured.controls.items()}
    names = next(iter(measured.controls.values()))
    mine = {k: v for k, v in measured.summary.items() if k in names}
    real = {k: v for k, v in bound.summary.items() if k in names}
    table = report.score_table(real, {"these clips": mine, **wrong})
    lags = measured.scores["lag"]
    counts, edges = np.histogram(lags[np.isfinite(lags)], 13, (0, 0.52))
    points = list(zip(edges[:-1].tolist(), map(float, counts), strict=True))
    plot = report.plot("clips by the shift of their sound, s", "lag", {"": points})
    title = f"Sound: {column.name}"
    return [report.section(title, table, f"<div class=plots>{plot}</div>")]


def _plots(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Plots of scores over solver steps and over guidance, if there are several."""
    drawn = []
    for axis, other in (("steps", "guidance"), ("guidance", "steps")):
        if len({c[axis] for c in columns}) < 2:
            continue
        for name in ("all", "physics"):
            series: dict[str, list[tuple[float, float]]] = {}
            for c in columns:
                label = f"{c['workdir']}, {other} {c[other]:g}"
                if c["real"][name][0] > 0:
                    share = c["scores"][name][0] / c["real"][name][0]
                    series.setdefault(label, []).append((c[axis], share))
            if series:
                title = f"{name}, share of real clips"
                drawn.append(report.plot(title, axis, series))
    return drawn


def _histories(histories: Mapping[str, History]) -> list[str]:
    """Plots of metrics from training: scores by step, and error by noise level."""
    scores: dict[str, list[tuple[float, float]]] = {}
    levels: dict[str, list[tuple[float, float]]] = {}
    for label, history in histories.items():
        for name, points in history.items():
            if name in _SHOWN:
                scores[f"{label} {name.partition('/')[2]}"] = points
            elif name.startswith("validation/t="):
                t = float(name.partition("=")[2])
                levels.setdefault(label, []).append((t, points[-1][1]))
    drawn = []
    if scores:
        drawn.append(report.plot("scores in training", "step", scores))
    if levels:
        drawn.append(report.plot("held-out error", "noise level t", levels))
    return drawn


def _parts(
    video: np.ndarray, fps: float, audio: np.ndarray | None, rate: int
) -> list[str]:
    """A clip, above its sound as it looks."""
    player = report.player(video, fps, audio, rate)
    if audio is None:
        return [player]
    return [player, report.picture(spectrogram(audio, rate, width=video.shape[2]))]


def _examples(measured: Measured, world: World) -> list[str]:
    """The best, median and worst clips, with the oracle's detections drawn on them."""
    names = ("count", "color", "shape", "size", "direction", "physics")
    quality = np.mean([measured.scores[name] for name in names], axis=0)
    parts = []
    for title, ids in report.examples(quality).items():
        clips, scenes = measured.clips, world.scenes(ids)
        videos = clips.videos[ids]
        audio = [None] * len(ids) if clips.audio is None else clips.audio[ids]
        seen = observe(videos, scenes, world.fps)
        figures = [
            report.figure(
                _parts(overlay(video, seen.found, i), world.fps, audio[i], clips.rate),
                prompt,
                [
                    "saw " + describe(seen.reading, seen.tracks, i),
                    ", ".join(f"{n} {measured.scores[n][ids[i]]:.2g}" for n in names),
                ],
            )
            for i, (video, prompt) in enumerate(
                zip(videos, world.captions(ids), strict=True)
            )
        ]
        parts.append(report.films(title, figures))
    return parts
