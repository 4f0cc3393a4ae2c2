"""Reads prompt files: each line is a prompt, or JSON with fields of a `Request`."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jvdit.generation.request import Request
from jvdit.machine.json_files import parse_json
from jvdit.machine.text_files import check_text, numbered_lines, read_text

_Picture = str | None | UnsetType


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a `Request` in JSON; images, videos and sounds are file paths."""

    prompt: str
    negative_prompt: str | UnsetType = UNSET
    frames: int | UnsetType = UNSET
    height: int | UnsetType = UNSET
    width: int | UnsetType = UNSET
    fps: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    image: _Picture = UNSET
    last_image: _Picture = UNSET
    video: _Picture = UNSET
    mask: _Picture = UNSET
    references: str | tuple[str, ...] | None | UnsetType = UNSET
    keyframes: tuple[tuple[float, str], ...] | UnsetType = UNSET
    prefix: _Picture = UNSET
    suffix: _Picture = UNSET
    interpolate: _Picture = UNSET
    upscale: _Picture = UNSET
    edges: _Picture = UNSET
    guide: _Picture = UNSET
    camera: str | None | UnsetType = UNSET
    restyle: _Picture = UNSET
    sound: bool | None | UnsetType = UNSET
    from_video: _Picture = UNSET
    from_sound: _Picture = UNSET
    keep_sound: tuple[tuple[float, float], ...] | UnsetType = UNSET


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
        check_text(fields.get(name, ""), f"{where}: `{name}`")
    if "references" in fields:
        given = fields["references"] or ()
        fields["references"] = (given,) if isinstance(given, str) else given
    return fields
