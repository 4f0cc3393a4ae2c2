"""Spans of a given sound that a clip keeps, while the rest of it is made."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

Spans = tuple[tuple[float, float], ...]  # seconds from and until
# Seconds by which a given sound and its clip may differ: files end with a whole packet.
LENIENT = 0.15
_BLEND = 0.005  # seconds around a span that is kept


def check_spans(spans: Spans) -> None:
    """Raises a ValueError unless spans are some, one after another."""
    last = 0.0
    for start, end in spans:
        if not last <= start < end:
            raise ValueError(
                f"`keep_sound` has {start:g}:{end:g} after {last:g} s; give spans of "
                "some length, from 0 s on, one after another without overlap."
            )
        last = end


def spans_within(spans: Spans, lasts: float) -> Spans:
    """The spans in a clip of so many seconds; infinity is its end.

    Raises:
        ValueError: one ends after the clip.
    """
    for start, end in spans:
        if start >= lasts or lasts + LENIENT < end < math.inf:
            raise ValueError(
                f"`keep_sound` {start:g}:{end:g} goes beyond the end of the clip, "
                f"which lasts {lasts:g} s; end it there, or ask for more `frames`."
            )
    return tuple((start, min(end, lasts)) for start, end in spans)


def told_spans(spans: Spans) -> list[list[float | None]]:
    """The spans as JSON has them, which has no infinity."""
    return [[start, end if end < math.inf else None] for start, end in spans]


def spans_told(told: Sequence[tuple[float, float | None]]) -> Spans:
    """Undoes `told_spans`."""
    return tuple((start, math.inf if end is None else end) for start, end in told)


def read_span(text: Any) -> tuple[float, float]:
    """A span as flags, forms and JSON have it: "0:0.5", "0.9:", [0, 0.5], [0.9, null].

    Raises:
        TypeError, ValueError, OverflowError: it is something else.
    """
    start, end = text.split(":") if isinstance(text, str) else text
    if isinstance(start, bool) or isinstance(end, bool):
        raise TypeError(text)
    return float(start), math.inf if end in (None, "") else float(end)


def blended(
    made: Float[np.ndarray, "a e"],
    given: Float[np.ndarray, "a e"],
    spans: Spans,
    rate: int,
) -> Float[np.ndarray, "a e"]:
    """A generated sound, in which the spans of the given one are as they were.

    Around each, a few milliseconds of both are blended, so that nothing clicks.

    Args:
        made: the generated sound.
        given: the given one.
        spans: those that are kept.
        rate: samples per second.
    """
    times, share = np.arange(len(made)) / rate, np.zeros(len(made))
    for start, end in spans:
        outside = np.maximum(start - times, times - end)
        share = np.maximum(share, np.clip(1 - outside / _BLEND, 0, 1))
    part = share[:, None].astype(np.float32)
    return np.where(part == 1, given, part * given + (1 - part) * made)
