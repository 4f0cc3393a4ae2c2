"""Builds an HTML report of models: tables, plots, and clips that play in the page.

The page is self-contained, so that it can be mailed and opened anywhere.
"""

import base64
import html
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image

from jvdit.data.media.writer import encode_clip
from jvdit.evaluation.breakdown import NAMES, Parts
from jvdit.evaluation.oracle import COLUMNS
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import write_json

# Mean, and the ends of its 95 % confidence interval.
Interval = Sequence[float]
Series = Mapping[str, Sequence[tuple[int | float, float]]]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto;
  padding: 0 1rem; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
@media (max-width: 700px) { table { display: block; overflow-x: auto } }
td small { color: #777 }
.bar { display: inline-block; height: .6em; background: #4878a8; margin-right: .5em;
  vertical-align: middle }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
  gap: 1rem }
.clips figure { margin: 0 }
video, img { width: 100%; image-rendering: pixelated }
video.heard { width: 50% }
figcaption { font-size: 13px } figcaption b { display: block }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Builds an HTML page from a title and parts that already are HTML."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title>"
    head += "<meta name=viewport content='width=device-width'>"
    body = f"<h1>{html.escape(title)}</h1>" + "\n".join(parts)
    head += f"<style>{_STYLE}</style>"
    return (
        f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"
    )


def write(
    out: pathlib.Path, results: Mapping[str, Any], title: str, parts: Sequence[str]
) -> list[pathlib.Path]:
    """Writes report.json, and a page of parts as report.html; returns their paths."""
    paths = [out / "report.json", out / "report.html"]
    write_json(paths[0], results)
    write_atomically(paths[1], page(title, parts).encode())
    return paths


def section(title: str, *parts: str) -> str:
    """Builds a section: a heading above parts that already are HTML."""
    return f"<h2>{html.escape(title)}</h2>" + "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Builds a table from a head of plain texts and cells that already are HTML."""
    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = ["<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def score_table(
    real: Mapping[str, Interval],
    scores: Mapping[str, Any],
    counts: Mapping[str, int] | None = None,
) -> str:
    """Builds a table of the scores of several models beside those of real clips.

    An arrow says which way is better: up, or towards a number.

    Args:
        real: scores of real clips, by name.
        scores: scores of each model, by model and then by name.
        counts: how many real clips each score is measured of, by its name.
    """
    rows, last = [], ""
    for name, column in COLUMNS.items():
        if name not in real and not any(name in found for found in scores.values()):
            continue
        if column.section != last:
            rows.append([f"<b>{column.section}</b>"] + [""] * (1 + len(scores)))
            last = column.section
        better = "↑" if column.best is None else f"→ {column.best:g}"
        told = f"{html.escape(column.meaning)} {better}"
        if counts is not None:
            told += f", n={counts.get(name, 0)}"
        label = f"{name} <small>{told}</small>"
        bound = real.get(name, (math.nan,) * 3)
        cells = [number(bound)]
        for found in scores.values():
            value = found.get(name, (math.nan,) * 3)
            cells.append(number(value) + _share(value, bound, column.best))
        rows.append([label, *cells])
    return table(["", "real clips", *scores], rows)


def parts_table(real: Parts, scores: Parts) -> str:
    """Builds a table of the scores of each part of the clips, beside real clips'.

    Args:
        real: scores of real clips, from `breakdown`.
        scores: scores of a model's clips, from `breakdown`.
    """
    rows = [
        [
            f"{part} <small>{found['clips']:.0f} clips</small>",
            *(
                f"{found[name]:.2f} <small>{real[part][name]:.2f}</small>"
                if name in found and name in real[part]
                else "–"
                for name in NAMES
            ),
        ]
        for part, found in scores.items()
    ]
    return table(["", *NAMES], rows) + "<p>Small: real clips.</p>"


def confusion_table(counts: Int[np.ndarray, "told seen"], words: Sequence[str]) -> str:
    """Builds a table of how often what is told is seen as what; the diagonal is right.

    Args:
        counts: clips or objects by what is told, and by what is seen; the last column
            is none of the words.
        words: names of the rows, and of the columns but the last.
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = [
        [
            html.escape(word),
            *(f"<b>{x:.2f}</b>" if i == j else f"{x:.2f}" for j, x in enumerate(row)),
        ]
        for i, (word, row) in enumerate(zip(words, share, strict=True))
    ]
    return table(["told \\ seen", *words, "none"], rows)


def _share(value: Interval, bound: Interval, best: float | None) -> str:
    """A bar that shows the share of the real clips' score, if higher is better."""
    if best is not None or not bound[0] > 0 or math.isnan(value[0]):
        return ""
    share = min(max(value[0] / bound[0], 0.0), 1.0)
    return f"<br><span class=bar style='width:{50 * share:.0f}px'></span>{share:.0%}"


def number(value: Interval) -> str:
    """Formats a mean with its confidence interval; a dash for NaN."""
    mean, low, high = value
    if math.isnan(mean):
        return "–"
    return f"{mean:.3f} <small>{low:.3f} … {high:.3f}</small>"


def plot(title: str, x_label: str, series: Series) -> str:
    """Plots a line for each series of points, as SVG.

    Args:
        title: title of the plot.
        x_label: label of the horizontal axis.
        series: points (x, y) of each line, by its label.
    """
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, points in series.items():
        ordered = sorted(points)
        axes.plot(*zip(*ordered, strict=True), marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel=x_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def film(
    video: UInt8[np.ndarray, "T H W 3"], fps: float, title: str, lines: Sequence[str]
) -> str:
    """Embeds a clip that plays in a loop, with a caption below it.

    Args:
        video: RGB in [0, 255].
        fps: frames per second.
        title: first line of the caption.
        lines: further lines.
    """
    return figure([player(video, fps)], title, lines)


def figure(parts: Sequence[str], title: str, lines: Sequence[str]) -> str:
    """Builds a figure of a clip: parts that already are HTML, with a caption below."""
    told = "".join(f"<br>{html.escape(line)}" for line in lines)
    caption = f"<figcaption><b>{html.escape(title)}</b>{told}</figcaption>"
    return f"<figure>{''.join(parts)}{caption}</figure>"


def player(
    video: UInt8[np.ndarray, "T H W 3"],
    fps: float,
    audio: Float[np.ndarray, "a e"] | None = None,
    audio_rate: int = 0,
) -> str:
    """Embeds a clip that plays in a loop; one with sound waits to be started.

    Args:
        video: RGB in [0, 255].
        fps: frames per second.
        audio: samples in [-1, 1]; None: there is no sound.
        audio_rate: samples per second.
    """
    buffer = io.BytesIO()
    encode_clip(buffer, video, fps, audio=audio, audio_rate=audio_rate)
    how = "autoplay muted" if audio is None else "class=heard"
    source = _embedded("video/mp4", buffer)
    return f"<video {how} loop playsinline controls src='{source}'></video>"


def picture(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Embeds a picture, RGB in [0, 255]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return f"<img src='{_embedded('image/png', buffer)}'>"


def _embedded(kind: str, file: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def films(title: str, figures: Sequence[str]) -> str:
    """Builds a grid of embedded clips, from `film`, under a heading."""
    return f"<h3>{html.escape(title)}</h3><div class=clips>{''.join(figures)}</div>"


def examples(
    quality: Float[np.ndarray, " n"], count: int = 3
) -> dict[str, Int[np.ndarray, " _"]]:
    """Selects example clips: the best, the median and the worst.

    Args:
        quality: quality of each clip; higher is better. Clips without any (NaN) are
            left out.
        count: how many clips of each.

    Returns:
        The indices of the clips, under "Best", "Median" and "Worst".
    """
    order = np.argsort(-quality, kind="stable")[: np.isfinite(quality).sum()]
    middle = max(len(order) - count, 0) // 2
    return {
        "Best": order[:count],
        "Median": order[middle : middle + count],
        "Worst": order[-count:],
    }
