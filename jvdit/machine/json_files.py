"""JSON files of settings: written whole, read with a line for what is damaged."""

import difflib
import json
import os
import pathlib
import re
import reprlib
from collections.abc import Mapping
from types import GenericAlias
from typing import Any, TypeVar

import msgspec

from jvdit.machine.files import write_atomically

PathLike = str | os.PathLike[str]
T = TypeVar("T")
_ANYTHING: Any = Any


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or the file that was there before."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(pathlib.Path(path), text.encode())


def read_json(
    path: PathLike, remedy: str, kind: type[T] | GenericAlias = _ANYTHING
) -> T:
    """Reads a JSON file.

    Args:
        path: of the file.
        remedy: what to do if it doesn't hold what it should.
        kind: what it should hold: a `msgspec.Struct`, a dataclass, `dict[str, int]`, ….
            Fields that a class doesn't know are ignored, unless it is a Struct with
            `forbid_unknown_fields`. The default takes any JSON as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, for example because it was cut off, or holds
            something else; the message names the file, the field and its value.
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
    """Reads a line, or another text, of JSON; see `read_json`.

    Args:
        text: the JSON. NaN, Infinity and names of files that are no UTF-8 are taken as
            Python's `json` writes them.
        where: what an error calls it: the file and the line, for example.
        kind: what it should hold.
        remedy: what to do if it doesn't.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}); {remedy}.") from error
    return fit_json(found, where, kind, remedy)


def fit_json(found: Any, where: str, kind: type[T] | GenericAlias, remedy: str) -> T:
    """JSON that another library has parsed as a type; see `parse_json`."""
    try:
        return msgspec.convert(found, kind, str_keys=True)
    except (ValueError, RecursionError) as error:
        told = _explained(str(error), found, kind)
        raise ValueError(f"{where}: {told}; {remedy}.") from error


def _explained(told: str, found: Any, kind: Any) -> str:
    """What msgspec says of JSON of another kind, with the value, or the right name."""
    if unknown := re.fullmatch(r"Object contains unknown field `([^`]*)`", told):
        known = [field.encode_name for field in msgspec.structs.fields(kind)]
        near = difflib.get_close_matches(unknown[1], known, 1, 0)[0]
        return f"`{unknown[1]}` is unknown, the nearest field is `{near}`"
    rule, _, place = told.partition(" - at `$")
    if rule.startswith("`"):  # from the class itself, and names the field
        return rule
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.{3})\]", place):
        if index == "...":  # a value of this dict, whose key isn't told
            break
        found = found[name or int(index)]
    rule = rule.replace("Expected", "must be")
    rule = rule.replace("Object missing", "lacks the").replace("Object contains", "has")
    field = f"`{place.strip('`.')}`" if place else "it"
    return f"{field} (={reprlib.repr(found)}) {rule}"


def differences(held: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between two nested settings, as "name: held X, asked Y"."""
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted({*held, *asked}):
            below = f"{name}.{key}" if name else key
            missing = "(nothing)"
            lines += differences(held.get(key, missing), asked.get(key, missing), below)
        return lines
    return [] if held == asked else [f"`{name}` is {held!r} there but {asked!r} here"]
