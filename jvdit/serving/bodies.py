"""Reads the bodies of requests: JSON or forms, and the files that come with them."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from jvdit.serving.guard import read_json_body

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w=.+-]+)*;base64,", re.ASCII)
_PART = re.compile(r"conditions\[(\w+)\](?:\[\d*\])?")
# What `input_reference` is, by the kind of its file: the first that a model takes.
_REFERENCE = {
    "image": ("image", "references"),
    "video": ("from_video", "video"),
    "audio": ("from_sound",),
}
_FILES, _FIELDS, _FIELD = 16, 64, 1 << 20  # parts of a form, and bytes of a field
Files = dict[str, list[bytes]]


async def read_body(
    http: HttpRequest, takes: Sequence[str]
) -> tuple[dict[str, Any], Files]:
    """Reads the fields of a body, and its files.

    Args:
        http: the request, with a body of JSON or of a form.
        takes: conditions that the model takes.

    Returns:
        The fields, and the contents of the files by condition.

    Raises:
        ValueError: the body, or a file in it, is malformed; names the field.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(read_json_body(await http.body()), takes)
    if kind != "multipart/form-data":
        raise ValueError(
            f"`content-type` (={kind[:60]!r}) must be application/json or "
            "multipart/form-data."
        )
    limits = {"max_files": _FILES, "max_fields": _FIELDS, "max_part_size": _FIELD}
    async with http.form(**limits) as form:
        return await _from_form(form.multi_items(), takes)


def _from_json(body: dict[str, Any], takes: Sequence[str]) -> tuple[Any, Files]:
    files: Files = {}
    fields = {k: v for k, v in body.items() if v is not None}
    given = fields.pop("conditions", {})
    if not isinstance(given, dict):
        raise ValueError("`conditions` must be an object of data URLs by condition.")
    for name, value in given.items():
        several = value if isinstance(value, list) else [value]
        place = f"conditions.{name}"
        for each in several[:_FILES]:
            _put(files, name, _from_url(each, place)[1], takes, place)
    if (value := fields.pop("input_reference", None)) is not None:
        value = value.get("image_url") if isinstance(value, dict) else value
        kind, content = _from_url(value, "input_reference")
        name = _referred(kind, takes)
        _put(files, name, content, takes, "input_reference")
    return fields, files


async def _from_form(items: Any, takes: Sequence[str]) -> tuple[Any, Files]:
    files: Files = {}
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
        place = f"conditions.{part[1]}" if part else name
        if isinstance(value, UploadFile):
            kind, content = value.content_type or "image/*", await value.read()
        else:
            kind, content = _from_url(value, place)
        _put(files, part[1] if part else _referred(kind, takes), content, takes, place)
    return fields, files


def _referred(kind: str, takes: Sequence[str]) -> str:
    """The condition that an `input_reference` of this media type is."""
    names = _REFERENCE.get(kind.partition("/")[0], ("image",))
    return next((name for name in names if name in takes), names[0])


def _put(
    files: Files, name: str, content: bytes, takes: Sequence[str], place: str
) -> None:
    """Adds a file to those of a condition."""
    if name not in takes:
        told = ", ".join(f"`{x}`" for x in takes) or "none"
        raise ValueError(
            f"`{place}` isn't taken: of conditions this model takes {told}."
        )
    if not content:
        raise ValueError(f"`{place}` is empty.")
    if name in files and name != "references":
        raise ValueError(f"`{place}` is given twice.")
    files.setdefault(name, []).append(content)


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
