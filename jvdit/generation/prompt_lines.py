"""Prompts as people write them down: a line each, or JSON with fields of a request."""

import dataclasses
import json
from typing import Any

from jvdit.generation.request import Request, size_like

_KINDS: dict[str, Any] = {
    "prompt": str,
    "negative_prompt": str,
    "frames": int,
    "height": int,
    "width": int,
    "seed": int,
    "fps": (int, float),
}


def read_requests(
    prompts: list[str], defaults: dict[str, Any], unit: int = 0
) -> list[Request]:
    """Requests from prompts and from lines of JSON, with consecutive seeds.

    Args:
        prompts: each is a prompt, or a JSON object with fields of `Request`.
        defaults: fields that a line doesn't give.
        unit: what height and width are multiples of, where a first frame's proportions
            decide them; 0: the defaults do.

    Raises:
        ValueError: a line isn't a prompt, or has a field that is unknown or of the
            wrong kind.
    """
    requests = []
    for number, line in enumerate(prompts):
        fields = defaults | {"prompt": line, "seed": defaults["seed"] + number}
        given: dict[str, Any] = {}
        if line.lstrip().startswith("{"):
            given = _fields(line, f"line {number + 1}")
            fields |= given
            pictures = fields["references"]
            alone = isinstance(pictures, str)
            fields["references"] = (pictures,) if alone else tuple(pictures)
        if unit and fields["image"] and not {"height", "width"} & set(given):
            picture = Request("", image=fields["image"]).pictures[0]
            pixels = fields["height"] * fields["width"]
            height, width = size_like(picture, pixels, unit)
            fields |= {"height": height, "width": width}
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
    return given
