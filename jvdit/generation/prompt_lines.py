"""Reads prompt files: each line is a prompt, or JSON with fields of a `Request`."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from jvdit.generation.request import Request
from jvdit.machine.json_files import parse_json

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
    references: str | tuple[str, ...] | UnsetType = UNSET
    sound: bool | None | UnsetType = UNSET
    from_video: _Picture = UNSET
    from_sound: _Picture = UNSET


def read_requests(prompts: Sequence[str], common: Mapping[str, Any]) -> list[Request]:
    """Parses prompts, or lines of JSON, into requests with consecutive seeds.

    Args:
        prompts: each is a prompt, or a JSON object with fields of `Request`.
        common: fields for all requests, which a line of JSON may override; `seed` is
            that of the first.

    Raises:
        ValueError: a line of JSON is malformed, or has a field that is unknown or of
            the wrong type.
    """
    requests = []
    for number, line in enumerate(prompts):
        fields = {**common, "prompt": line, "seed": common.get("seed", 0) + number}
        if line.lstrip().startswith("{"):
            given = parse_json(line, f"line {number + 1}", _Line)
            given = msgspec.structs.asdict(given).items()
            fields |= {name: value for name, value in given if value is not UNSET}
            if isinstance(fields.get("references"), str):
                fields["references"] = (fields["references"],)
        requests.append(Request(**fields))
    return requests
