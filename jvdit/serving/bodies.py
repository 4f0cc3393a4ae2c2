"""Reads the bodies of requests: JSON or forms, and the files that come with them."""

import base64
import binascii
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from jvdit.generation.request import FIELDS_GIVEN, SEVERAL
from jvdit.generation.sound_spans import read_span
from jvdit.machine.json_files import parse_json

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.ASCII)
_PART = re.compile(r"conditions\[(\w+)\](?:\[([\w.+-]*)\])?", re.ASCII)
# What `input_reference` is, by the kind of its file: the first that a model takes.
_REFERENCE = {
    "image": ("image", "references"),
    "video": ("from_video", "video"),
    "audio": ("from_sound",),
}
_FILES, _FIELDS, _FIELD = 16, 64, 1 << 20  # parts of a form, and bytes of a field


@dataclasses.dataclass
class Uploads:
    """The files of a body.

    Attributes:
        takes: conditions that the model takes.
        files: contents of the files, by condition.
        keyframes: seconds of each picture of `keyframes`.
        keep_sound: spans, which are no files: seconds from and until.
    """

    takes: Sequence[str]
    files: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)
    keyframes: list[float] = dataclasses.field(default_factory=list)
    keep_sound: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def put(self, name: str, content: bytes, place: str) -> None:
        """Adds a file to those of a condition; errors name its place in the body."""
        self._check_taken(name, place)
        if not content:
            raise ValueError(f"`{place}` is empty.")
        if name in self.files and name not in SEVERAL:
            raise ValueError(f"`{place}` is given twice.")
        several = self.files.setdefault(name, [])
        if len(several) == _FILES:
            raise ValueError(f"`{place}` must be at most {_FILES} files.")
        several.append(content)

    def _check_taken(self, name: str, place: str) -> None:
        if name not in self.takes:
            told = ", ".join(f"`{x}`" for x in self.takes) or "none"
            raise ValueError(f"`{place}` isn't taken; this model takes {told}.")

    def put_span(self, value: Any, place: str) -> None:
        """Adds a span of a sound: [0, 0.5], or "0:0.5"; no end is the clip's."""
        self._check_taken("keep_sound", place)
        try:
            self.keep_sound.append(read_span(value))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"`{place}` (={str(value)[:40]!r}) must be spans such as [0, 0.5], in "
                "seconds, in forms 0:0.5."
            ) from None

    def put_keyframe(self, time: Any, content: bytes, place: str) -> None:
        """Adds a keyframe at a time in seconds."""
        try:
            seconds = float(time)
        except (TypeError, ValueError, OverflowError):
            seconds = math.nan
        if isinstance(time, bool) or not 0 <= seconds < math.inf:
            raise ValueError(
                f"`{place}` is at {str(time)[:40]!r}; give the seconds at which it is "
                "to be seen, 0 or more."
            )
        self.put("keyframes", content, place)
        self.keyframes.append(seconds)


async def read_body(
    http: HttpRequest, takes: Sequence[str]
) -> tuple[dict[str, Any], Uploads]:
    """Reads the fields of a body, and its files.

    Args:
        http: the request, with a body of JSON or of a form.
        takes: conditions that the model takes.

    Returns:
        The fields, and the files.

    Raises:
        ValueError: the body, or a file in it, is malformed; names the field.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = parse_json(await http.body(), "the body", dict[str, Any])
        fields, files = _from_json(body, takes)
    elif kind == "multipart/form-data":
        limits = {"max_files": _FILES, "max_fields": _FIELDS, "max_part_size": _FIELD}
        async with http.form(**limits) as form:
            fields, files = await _from_form(form.multi_items(), takes)
    else:
        raise ValueError(
            f"`content-type` (={kind[:60]!r}) must be application/json or "
            "multipart/form-data."
        )
    for name in fields:
        if name in FIELDS_GIVEN:
            raise ValueError(
                f"`{name}` is a condition; give it as `conditions.{name}`, in a form "
                f"as `conditions[{name}]`."
            )
    return fields, files


def _from_json(body: dict[str, Any], takes: Sequence[str]) -> tuple[Any, Uploads]:
    files = Uploads(takes)
    fields = {k: v for k, v in body.items() if v is not None}
    given = fields.pop("conditions", {})
    if not isinstance(given, dict):
        raise ValueError("`conditions` must be an object of data URLs by condition.")
    for name, value in given.items():
        place = f"conditions.{name}"
        for each in value if isinstance(value, list) else [value]:
            if name == "keep_sound":
                files.put_span(each, place)
            elif name == "keyframes":
                _put_keyframe(files, each, place)
            else:
                files.put(name, _from_url(each, place)[1], place)
    if (value := fields.pop("input_reference", None)) is not None:
        value = value.get("image_url") if isinstance(value, dict) else value
        kind, content = _from_url(value, "input_reference")
        files.put(_referred(kind, takes), content, "input_reference")
    return fields, files


def _put_keyframe(files: Uploads, value: Any, place: str) -> None:
    if not isinstance(value, dict) or {*value} != {"seconds", "image"}:
        raise ValueError(
            f'`{place}` must be objects of the form {{"seconds": 0.5, "image": '
            '"data:image/png;base64,…"}.'
        )
    content = _from_url(value["image"], f"{place}.image")[1]
    files.put_keyframe(value["seconds"], content, place)


async def _from_form(items: Any, takes: Sequence[str]) -> tuple[Any, Uploads]:
    files = Uploads(takes)
    fields: dict[str, Any] = {}
    for name, value in items:
        part = _PART.fullmatch(name)
        if part is None and name != "input_reference":
            if isinstance(value, UploadFile):
                raise ValueError(
                    f"`{name[:60]}` is a file; give files as `input_reference` or "
                    "`conditions[NAME]`."
                )
            if name in fields:
                raise ValueError(f"`{name[:60]}` is given twice.")
            fields[name] = value
            continue
        place = name[:60]
        if part and part[1] == "keep_sound":
            files.put_span(value, place)
            continue
        if isinstance(value, UploadFile):
            kind, content = value.content_type or "image/*", await value.read()
        else:
            kind, content = _from_url(value, place)
        condition = part[1] if part else _referred(kind, takes)
        if condition == "keyframes":
            files.put_keyframe(part and part[2], content, place)
        else:
            files.put(condition, content, place)
    return fields, files


def _referred(kind: str, takes: Sequence[str]) -> str:
    """The condition that an `input_reference` of this media type is."""
    names = _REFERENCE.get(kind.partition("/")[0], ("image",))
    return next((name for name in names if name in takes), names[0])


def _from_url(value: Any, place: str) -> tuple[str, bytes]:
    """The media type and content of a data URL; nothing else is ever opened."""
    match = _DATA.match(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"`{place}` must be a data URL (data:image/png;base64,…), or a file in a "
            "form; this server opens no other URLs, and no paths."
        )
    try:
        content = base64.b64decode(value[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`{place}` isn't base64: {error}.") from None
    return match[1] or "image/*", content
