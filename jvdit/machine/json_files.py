"""JSON files: written atomically, and checked against a type when they are read."""

import difflib
import json
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from types import GenericAlias
from typing import Any, TypeVar

import msgspec

from jvdit.machine.files import write_atomically

PathLike = str | os.PathLike[str]
T = TypeVar("T")
_ANYTHING: Any = Any


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON file atomically: readers see all of it, or the file before it."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(pathlib.Path(path), text.encode())


def read_json(
    path: PathLike, remedy: str, kind: type[T] | GenericAlias = _ANYTHING
) -> T:
    """Reads a JSON file and converts it to a type.

    Args:
        path: the file.
        remedy: advice for the error message, such as "copy it anew".
        kind: the type to convert to: a `msgspec.Struct`, a dataclass, `dict[str, int]`,
            …. Unknown fields of a class are ignored, unless it is a Struct with
            `forbid_unknown_fields`. By default any JSON is returned as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file isn't JSON, for example because it was truncated, or isn't
            of that type; the message names the file, the field and its value.
    """
    try:
        text = pathlib.Path(path).read_bytes()
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{path} is no file ({error.strerror}); {remedy}.") from error
    return parse_json(text, os.fspath(path), kind, remedy)


def parse_json(
    text: str | bytes,
    where: str,
    kind: type[T] | GenericAlias = _ANYTHING,
    remedy: str = "correct it",
) -> T:
    """Parses a JSON text and converts it to a type, as `read_json` does for a file.

    Args:
        text: the JSON. NaN, Infinity and file names that aren't valid UTF-8 are
            accepted as Python's `json` writes them.
        where: name of the text in error messages, such as its file and line.
        kind: the type to convert to.
        remedy: advice for the error message.

    Raises:
        ValueError: the text isn't JSON, or isn't of that type.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}); {remedy}.") from error
    return fit_json(found, where, kind, remedy)


def fit_json(
    found: Any, where: str, kind: Any, remedy: str, strict: bool = True
) -> Any:
    """Converts JSON values that are already parsed to a type, as `parse_json` does.

    If not `strict`, numbers may be text, as in forms.
    """
    try:
        return msgspec.convert(found, kind, str_keys=True, strict=strict)
    except (ValueError, RecursionError) as error:
        told = _explained(str(error), found, kind)
        raise ValueError(f"{where}: {told}; {remedy}.") from error


def _explained(told: str, found: Any, kind: Any) -> str:
    """Rewords msgspec's error with the wrong value, or the nearest known field."""
    if unknown := re.fullmatch(r"Object contains unknown field `([^`]*)`", told):
        known = [field.encode_name for field in msgspec.structs.fields(kind)]
        near = nearest(unknown[1], known)
        return f"`{unknown[1]}` is unknown, the nearest field is `{near}`"
    rule, _, place = told.partition(" - at `$")
    if rule.startswith("`"):  # from the class itself, and names the field
        return rule
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.{3})\]", place):
        if index == "...":  # a value of this dict; msgspec doesn't tell its key
            break
        found = found[name or int(index)]
    rule = rule.replace("Expected", "must be")
    rule = rule.replace("Object missing", "lacks the").replace("Object contains", "has")
    field = f"`{place.strip('`.')}`" if place else "it"
    return f"{field} (={reprlib.repr(found)}) {rule}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is spelled most like a given one, for error messages."""
    return difflib.get_close_matches(name, list(known), 1, 0)[0]


def differences(held: Any, asked: Any, name: str = "") -> list[str]:
    """Lists what differs between two nested settings, one line for each value.

    Args:
        held: the settings called "there" in the lines.
        asked: the settings called "here".
        name: prefix of the names in the lines.
    """
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted({*held, *asked}):
            below = f"{name}.{key}" if name else key
            missing = "(nothing)"
            lines += differences(held.get(key, missing), asked.get(key, missing), below)
        return lines
    return [] if held == asked else [f"`{name}` is {held!r} there but {asked!r} here"]
