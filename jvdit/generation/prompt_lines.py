"""Reads prompt files: each line is a prompt, or JSON with fields of a `Request`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jvdit.generation.fields import plain
from jvdit.generation.request import LATENTS, STATES, Request
from jvdit.generation.sound_spans import spans_told
from jvdit.machine.json_files import parse_json
from jvdit.machine.text_files import check_text, numbered_lines, read_text

# The fields of a `Request` that hold several values, as JSON has them.
_SEVERAL: dict[str, Any] = {
    "references": str | tuple[str, ...],
    "keyframes": tuple[tuple[float, str], ...],
    "keep_sound": tuple[tuple[float, float | None], ...],
}


def _field(field: dataclasses.Field[Any]) -> tuple[str, Any, Any]:
    """A field of a line: files are paths, and null leaves open all but the seed."""
    kind = _SEVERAL.get(field.name, plain(field)) | UnsetType
    return field.name, kind if field.name == "seed" else kind | None, UNSET


_FIELDS = [x for x in dataclasses.fields(Request) if x.name not in (*LATENTS, *STATES)]
_Line = msgspec.defstruct(
    "Line", [("prompt", str), *map(_field, _FIELDS[1:])], forbid_unknown_fields=True
)


def read_prompts(path: str) -> list[tuple[str, str]]:
    """Reads a prompt file.

    Returns:
        The place of each line that isn't blank, such as "prompts.jsonl line 3", and it.

    Raises:
        OSError: the file can't be read.
        ValueError: it isn't UTF-8, nor UTF-16 with a mark.
    """
    lines = numbered_lines(read_text(path, lenient=True))
    return [(f"{path} line {number}", line) for number, line in lines]


def read_request(line: str, where: str, common: Mapping[str, Any]) -> Request:
    """Parses a prompt, or a line of JSON, into a request.

    Args:
        line: a prompt, or a JSON object with fields of `Request`.
        where: name of the line in error messages.
        common: fields for all requests, which a line of JSON may override.

    Raises:
        ValueError: the JSON is malformed, has a field that is unknown or of the wrong
            type or out of its range, or the prompt isn't text.
    """
    given = _given(line, where)
    try:
        return Request(**{**common, **given})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _given(line: str, where: str) -> dict[str, Any]:
    """The fields that a line gives."""
    if not line.lstrip().startswith("{"):
        return {"prompt": check_text(line, f"{where}: the prompt")}
    found = msgspec.structs.asdict(parse_json(line, where, _Line))
    fields = {name: value for name, value in found.items() if value is not UNSET}
    for name in ("prompt", "negative_prompt"):
        check_text(fields.get(name) or "", f"{where}: `{name}`")
    fields |= {name: fields[name] or () for name in _SEVERAL if name in fields}
    if isinstance(fields.get("references"), str):
        fields["references"] = (fields["references"],)
    if "keep_sound" in fields:
        fields["keep_sound"] = spans_told(fields["keep_sound"])
    return fields
