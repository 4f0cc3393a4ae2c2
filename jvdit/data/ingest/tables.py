"""Tables and lists of videos, read strictly: a bad row is an item with its reason."""

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from jvdit.data.ingest.clip_file import ClipFile
from jvdit.data.media.pictures import PICTURES
from jvdit.data.media.reader import VIDEOS
from jvdit.data.parquet import parquet_errors
from jvdit.machine.json_files import fit_json, parse_json
from jvdit.machine.text_files import check_text, numbered_lines, read_text

TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
PATH_COLUMNS = ("file_name", "path", "video", "video_path", "media_path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")
BESIDE_COLUMNS = ("guide_path", "camera_path")
CAPTION_LISTS = ("prompt.txt", "prompts.txt", "captions.txt")

_Rows = Iterable[tuple[str, Mapping[str, Any] | ValueError]]  # place in the table, row
_SUFFIXES = "|".join(sorted(x[1:] for x in VIDEOS | PICTURES))
csv.field_size_limit(sys.maxsize)  # a caption may be longer than the default


class _Row(msgspec.Struct):
    """What is read of a row, whatever its columns are called."""

    path: str
    caption: str | list[str | None] | None
    guide_path: str | None = None
    camera_path: str | None = None


def read_table(table: Path, root: Path) -> Iterator[ClipFile]:
    """Yields the items of a table; a row that can't be one has its reason.

    Args:
        table: csv, tsv, json, jsonl or parquet.
        root: what relative paths are relative to.

    Raises:
        ValueError: the table can't be read, or has no column of paths.
    """
    read = {".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines}
    rows = list(read.get(table.suffix.lower(), _whole)(table))
    good = [row for _, row in rows[:100] if not isinstance(row, ValueError)]
    columns = list(dict.fromkeys(str(x).strip() for row in good for x in row))
    if columns and not {x.lower() for x in columns} & set(PATH_COLUMNS):
        raise ValueError(
            f"{table} has no column of paths; it has {sorted(columns)}, and a path is "
            f"one of {', '.join(PATH_COLUMNS)}."
        )
    note = f"columns of {table.name}: {', '.join(columns)}"
    for place, row in rows:
        yield _item(f"{table} {place}", row, root, note)


def read_list(source: Path, root: Path) -> Iterator[ClipFile]:
    """Yields the items of a list of paths, with the list of captions beside it.

    Raises:
        ValueError: the lists differ in length.
    """
    paths = read_text(source, lenient=True).rstrip("\n").split("\n")
    captions = [""] * len(paths)
    note = f"no {' or '.join(CAPTION_LISTS)} beside {source.name}"
    other = next(filter(Path.is_file, map(source.with_name, CAPTION_LISTS)), source)
    if other != source:
        captions = read_text(other, lenient=True).split("\n")
        while len(captions) > len(paths) and not captions[-1].strip():
            captions.pop()
        if len(captions) != len(paths):
            raise ValueError(
                f"{other} has {len(captions)} lines and {source} {len(paths)}; "
                "they must match line by line."
            )
        note = ""
    for number, (path, caption) in enumerate(zip(paths, captions, strict=True), 1):
        if path.strip() or caption.strip():
            row = {"path": path, "caption": caption}
            yield _item(f"{source} line {number}", row, root, note)


def caption_of(row: Mapping[str, Any], where: str) -> str:
    """Returns the caption of a row or of a JSON file beside a video, or "".

    Raises:
        ValueError: it isn't text.
    """
    return _caption(_fitted({**row, "path": "-"}, where), where)


def _item(where: str, row: Mapping[str, Any] | ValueError, root: Path, note: str):
    """The item of a row, or why it is none."""
    name = where.replace(f"{root}/", "", 1)
    try:
        if isinstance(row, ValueError):
            raise row
        fitted = _fitted(row, where)
        name = fitted.path.strip()
        caption = _caption(fitted, where)
    except ValueError as error:
        return ClipFile(name, where, "", "bad_row", str(error))
    note = "" if caption else note
    paths = fitted.guide_path, fitted.camera_path
    beside = [str(root / path.strip()) if path else "" for path in paths]
    return ClipFile(name, str(root / name), caption, "", "", note, *beside)


def _fitted(row: Mapping[str, Any], where: str) -> _Row:
    lower = {str(name).strip().lower(): value for name, value in row.items()}

    def first(names: Iterable[str]) -> Any:
        return next((lower[x] for x in names if _filled(lower.get(x))), None)

    found = {"path": first(PATH_COLUMNS), "caption": first(CAPTION_COLUMNS)}
    found |= {name: first([name]) for name in BESIDE_COLUMNS}
    if found["path"] is None:
        raise ValueError(f"{where} names no file.")
    return fit_json(found, where, _Row, "correct it")


def _filled(value: Any) -> bool:
    """Whether a value says anything: None, NaN and blank text don't."""
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, str):
        return value.strip().lower() not in ("", "nan")
    return value is not None and value != []


def _caption(row: _Row, where: str) -> str:
    several = row.caption if isinstance(row.caption, list) else [row.caption]
    first = next(filter(_filled, several), None) or ""  # of several captions
    return check_text(first, f"{where}: the caption").strip()


def _delimited(table: Path) -> _Rows:
    """Yields the rows of a csv or tsv file, refusing those of another length."""
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    text = io.StringIO(read_text(table, lenient=True), newline="")
    form = {"delimiter": delimiter, "skipinitialspace": delimiter == ","}
    reader = csv.reader(text, strict=True, **form)
    like_a_row = re.compile(rf"\n[^\n]*\.({_SUFFIXES})\"?\s*{delimiter}", re.I)
    header: list[str] = []
    while True:
        begun = reader.line_num + 1
        place = f"line {begun}"
        try:
            if (fields := next(reader, None)) is None:
                return
            if any(map(like_a_row.search, fields)):
                raise csv.Error("another row is within its quotes")
        except csv.Error as error:
            told = (
                f"{table} {place}: a quote isn't closed, or not where its field ends "
                f"({error}); close it, and write a quote within quotes twice."
            )
            if not header or reader.line_num > begun or "unexpected end" in str(error):
                raise ValueError(told) from None  # who knows where the next row begins
            yield place, ValueError(told)
            continue
        if not any(map(str.strip, fields)):
            continue
        if not header:
            header = [name.strip().lower() for name in fields]
            if len({*header}) < len(header):
                raise ValueError(f"{table} names a column twice: {fields}.")
        elif len(fields) != len(header):
            told = f"has {len(fields)} fields and its header {len(header)}"
            remedy = f"put text with {delimiter!r} in quotes"
            yield place, ValueError(f"{table} {place} {told}; {remedy}.")
        else:
            yield place, dict(zip(header, fields, strict=True))


def _json_lines(table: Path) -> _Rows:
    for number, line in numbered_lines(read_text(table, lenient=True)):
        place = f"line {number}"
        try:
            yield place, parse_json(line, f"{table} {place}", dict)
        except ValueError as error:
            yield place, error


def _whole(table: Path) -> _Rows:
    """Yields the rows of a parquet or json file."""
    if table.suffix.lower() == ".parquet":
        rows: Any = _parquet_rows(table)
    else:
        rows = parse_json(read_text(table, lenient=True), str(table))
        rows = fit_json(rows, str(table), dict | list, "correct it")
    if isinstance(rows, dict):  # {"a.mp4": "caption"} or {"a.mp4": {"caption": ..}}
        rows = [
            {"path": path} | (row if isinstance(row, dict) else {"caption": row})
            for path, row in rows.items()
        ]
    for number, row in enumerate(rows, 1):
        place = f"row {number}"
        try:
            yield place, fit_json(row, f"{table} {place}", dict, "correct it")
        except ValueError as error:
            yield place, error


def _parquet_rows(table: Path) -> list[dict[str, Any]]:
    """The columns that matter; of the others the names alone, in the first row."""
    wanted = {*PATH_COLUMNS, *CAPTION_COLUMNS, *BESIDE_COLUMNS}
    with parquet_errors(table, "copy it again"):
        names = pq.read_schema(table).names
        kept = [name for name in names if name.strip().lower() in wanted]
        found = pq.read_table(table, columns=kept or names[:1]).to_pylist()
    return [dict.fromkeys(names) | row for row in found[:1]] + found[1:]
