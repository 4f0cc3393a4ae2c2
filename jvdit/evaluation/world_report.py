"""The report on models of the procedural world: scores beside those of real clips."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvdit.data.world import World
from jvdit.evaluation import distance, report
from jvdit.evaluation.adherence import describe, read
from jvdit.evaluation.breakdown import breakdown
from jvdit.evaluation.detection import detect
from jvdit.evaluation.measuring import Measured, neighbours
from jvdit.evaluation.overlay import overlay
from jvdit.evaluation.tracks import follow

_SHOWN = tuple(f"oracle/{n}" for n in ("all", "color", "shape", "direction"))
# Of a training: (step, value) by the name of a metric.
History = Mapping[str, Sequence[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the report: clips of a model, generated in one way.

    Attributes:
        label: the model's.
        how: they were generated: fields of the report, `str` of which says it.
        world: of their prompts.
        measured: what was found.
    """

    label: str
    how: Any
    world: World
    measured: Measured

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.label}: {self.how}"


def results_of(
    columns: Sequence[Column], bounds: Mapping[World, Measured]
) -> list[dict[str, Any]]:
    """What the report says, as JSON.

    Args:
        columns: of the report.
        bounds: real clips of each world.
    """
    known = {world: neighbours(world) for world in bounds}
    return [
        {
            "workdir": column.label,
            "world": dataclasses.asdict(column.world),
            **dataclasses.asdict(column.how),
            "scores": column.measured.summary,
            "real": (bound := bounds[column.world]).summary,
            "parts": breakdown(column.measured.scores, scenes),
            "real_parts": breakdown(bound.scores, scenes),
            **distance.memorisation(column.measured.thumbnails, *known[column.world]),
            "frechet": distance.frechet_distance(
                column.measured.features, bound.features
            ),
        }
        for column in columns
        for scenes in [column.world.scenes(np.arange(len(column.measured.videos)))]
    ]


def page(
    title: str,
    results: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    bounds: Mapping[World, Measured],
    histories: Mapping[str, History],
) -> str:
    """One page of HTML: tables, plots, and clips to look at.

    Args:
        title: of the page.
        results: from `results_of`.
        columns: the same.
        bounds: the same.
        histories: of the trainings, by label.
    """
    parts = []
    for world, bound in bounds.items():
        scores = {x.name: x.measured.summary for x in columns if x.world == world}
        size = f"{world.frames} x {world.height} x {world.width} at {world.fps:g} fps"
        parts.append(report.section(size, report.score_table(bound.summary, scores)))
    rows = []
    for column, found in zip(columns, results, strict=True):
        table = report.parts_table(found["real_parts"], found["parts"])
        name = f"By what is in the clips, {column.name}"
        parts.append(report.section(name, table))
        numbers = (found[name] for name in ("copies", "authentic", "frechet"))
        rows.append([column.name, *(f"{number:.4f}" for number in numbers)])
    head = ["", "copies of training clips", "authentic", "Fréchet distance to real"]
    parts.append(report.section("As a set", report.table(head, rows)))
    plots = "".join(_plots(results) + _histories(histories))
    parts.append(report.section("Plots", f"<div class=plots>{plots}</div>"))
    for column in {x.label: x for x in reversed(columns)}.values():
        clips = _examples(column.measured, column.world)
        parts.append(report.section(column.name, *clips))
    return report.page(title, parts)


def _plots(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Scores over steps and over guidance, where there are several."""
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
    """What the trainings measured on their way: scores, and error by noise level."""
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


def _examples(measured: Measured, world: World) -> list[str]:
    """The best, the median and the worst clips, with what the oracle saw in them."""
    names = ("count", "color", "shape", "size", "direction", "physics")
    quality = np.mean([measured.scores[name] for name in names], axis=0)
    parts = []
    for title, ids in report.examples(quality).items():
        videos, scenes = measured.videos[ids], world.scenes(ids)
        found = detect(videos)
        tracks = follow(videos, found, scenes, world.fps)
        reading = read(found, tracks, scenes, world.fps)
        figures = [
            report.film(
                overlay(video, found, i),
                world.fps,
                prompt,
                [
                    "saw " + describe(reading, tracks, i),
                    ", ".join(f"{n} {measured.scores[n][ids[i]]:.2g}" for n in names),
                ],
            )
            for i, (video, prompt) in enumerate(
                zip(videos, world.captions(ids), strict=True)
            )
        ]
        parts.append(report.films(title, figures))
    return parts
