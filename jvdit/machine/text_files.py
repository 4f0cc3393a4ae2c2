"""Text that people wrote: UTF-8 with or without a byte order mark, or marked UTF-16."""

import codecs
import os
import re
from pathlib import Path

_MARKED = {  # the longer marks first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read_text(path: str | os.PathLike[str], *, lenient: bool = False) -> str:
    r"""Reads a text file; its lines end in "\n", whatever they ended in.

    Args:
        path: the file.
        lenient: whether bytes that can't be decoded become lone surrogates, so that
            `check_text` finds them and only the row that holds them is lost.

    Raises:
        OSError: the file can't be read.
        ValueError: a byte can't be decoded; the message names file and line.
    """
    data = Path(path).read_bytes()
    marked = (name for mark, name in _MARKED.items() if data.startswith(mark))
    encoding = next(marked, "utf-8-sig")
    passing = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    try:
        text = data.decode(encoding, passing if lenient else "strict")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} isn't {name}; save "
            "the file as UTF-8."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines that aren't blank, with their numbers from 1.

    They are split at line feeds alone: captions may hold U+2028 and its like.
    """
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def check_text(text: str, where: str) -> str:
    """Returns a text if it can be stored and tokenized.

    Raises:
        ValueError: it holds a NUL, half of a character beyond U+FFFF, or bytes that
            couldn't be decoded.
    """
    if found := _NO_TEXT.search(text):
        raise ValueError(
            f"{where} has U+{ord(found[0]):04X} at character {found.start() + 1}, "
            "which isn't text; remove it, and save the file as UTF-8."
        )
    return text


def printable(text: str) -> str:
    """A text with whatever isn't Unicode spelled out, so that any file can hold it."""
    return text.encode(errors="backslashreplace").decode()
