"""JSON files of settings: written whole, read with a line for what is damaged."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jvdit.machine.files import write_atomically

PathLike = str | os.PathLike[str]


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or the file that was there before."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(pathlib.Path(path), text.encode())


def read_json(path: PathLike, remedy: str) -> Any:
    """Reads JSON.

    Args:
        path: of the file.
        remedy: what to do if it is damaged.

    Raises:
        ValueError: it is no JSON, for example because it was cut off.
    """
    try:
        return json.loads(pathlib.Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error


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
