"""Prompts as people write them down: a line each, or JSON with fields of a request."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jvdit.generation.request import Request

_KINDS: dict[str, Any] = {
    "prompt": str,
    "negative_prompt": str,
    "frames": int,
    "height": int,
    "width": int,
    "seed": int,
    "fps": (int, float),
}


def read_requests(prompts: Sequence[str], common: Mapping[str, Any]) -> list[Request]:
    """Requests from prompts and from lines of JSON, with consecutive seeds.

    Args:
        prompts: each is a prompt, or a JSON object with fields of `Request`.
        common: fields of all of them, which a line may replace; `seed` is the first's.

    Raises:
        ValueError: a line isn't a prompt, or has a field that is unknown or of the
            wrong kind.
    """
    requests = []
    for number, line in enumerate(prompts):
        fields = {**common, "prompt": line, "seed": common.get("seed", 0) + number}
        if line.lstrip().startswith("{"):
            fields |= _fields(line, f"line {number + 1}")
            if isinstance(fields.get("references"), str):
                fields["references"] = (fields["references"],)
        requests.append(Request(**fields))
    return requests


def _fields(line: str, place: str) -> dict[str, Any]:
    """The fields that a line of JSON gives."""
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    names = {field.name for field in dataclasses.fields(Request)}
    if unknown := set(given) - names:
        raise ValueError(
            f"{place} has the unknown fields {sorted(unknown)}; "
            f"known are {sorted(names)}."
        )
    if "prompt" not in given:
        raise ValueError(f"{place} has no `prompt`.")
    for name, kind in _KINDS.items():
        if name in given and not isinstance(given[name], kind):
            raise ValueError(
                f"{place}: `{name}` (={given[name]!r}) must be "
                f"{'text' if kind is str else 'a number'}."
            )
    if isinstance(given.get("references"), list):
        given["references"] = tuple(given["references"])
    return given
