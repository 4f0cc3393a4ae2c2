"""The fields of requests and settings, as flags and lines of JSON give them."""

import dataclasses
import inspect
import re
from types import UnionType
from typing import Any, get_args, get_origin


def described(owner: type) -> dict[str, str]:
    """What the docstring of a class says of each of its attributes, on one line."""
    entry = re.compile(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in entry.findall(inspect.getdoc(owner) or ""):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def plain(field: dataclasses.Field[Any]) -> type:
    """The type of a field as plain text has it: a file is a `str`, files a `tuple`."""
    kind: Any = field.type
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    kinds = [get_origin(x) or x for x in kinds]
    return next((x for x in (tuple, bool, int, float) if x in kinds), str)
