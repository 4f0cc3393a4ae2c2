"""Lists of videos with captions, in every form that people keep them."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jvdit.data.ingest.clip_file import ClipFile
from jvdit.machine.files import local_path
from jvdit.machine.json_files import parse_json

SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm "
    ".wmv".split()
)
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PATH_COLUMNS = ("file_name", "path", "video", "video_path", "media_path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")


def list_items(
    inputs: Iterable[str | Path], *, root: str | Path | None = None
) -> list[ClipFile]:
    """Lists the videos of folders, tables and single files, sorted by key.

    A folder may hold `metadata.{jsonl,csv,parquet,json}` (the Hugging Face
    videofolder layout); else every video in it or below is taken, with the caption
    in the `.txt` (or `.json`) file of the same name. A table (csv, tsv, json, jsonl,
    parquet) has a column of paths and, usually, one of captions; see `PATH_COLUMNS`
    and `CAPTION_COLUMNS`. A `.txt` file is a list of paths, one a line; a second
    file `prompt.txt` or `prompts.txt` beside it then holds the captions. Rows that say
    the same thing twice count once.

    Args:
        inputs: folders, tables and videos.
        root: what relative paths in tables are relative to; None: the table's folder.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: an input is of no known form, or there is no video at all.
    """
    found: dict[tuple[str, str], str] = {}
    for entry in inputs:
        source = local_path(entry)
        if not source.exists():
            raise FileNotFoundError(f"There is no {source}.")
        for name, path, caption in _items_of(source, root):
            found.setdefault((str(path), caption), name)
    if not found:
        raise ValueError(
            f"No video in {', '.join(map(str, inputs))}; expected a folder of "
            f"{'/'.join(sorted(SUFFIXES))} files, or a table "
            f"({', '.join(TABLES)}) with a column of paths."
        )
    items: dict[str, ClipFile] = {}
    for (path, caption), name in sorted(found.items(), key=lambda e: (e[1], e[0])):
        key, copies = name, 1
        while key in items:  # one file with several captions, or one name twice
            copies += 1
            key = f"{name}~{copies}"
        items[key] = ClipFile(key, path, caption)
    return [*items.values()]


def _items_of(source: Path, root) -> Iterator[tuple[str, Path, str]]:
    """Yields (name, path, caption) of one input."""
    if source.is_dir():
        for suffix in (".jsonl", ".csv", ".parquet", ".json"):
            table = source / f"metadata{suffix}"
            if table.exists():
                yield from _table(table, root or source)
                return
        for path in sorted(source.rglob("*")):
            hidden = any(p.startswith(".") for p in path.relative_to(source).parts)
            if path.suffix.lower() in SUFFIXES and not hidden:
                yield path.relative_to(source).as_posix(), path, sidecar(path)
    elif source.suffix.lower() in TABLES:
        yield from _table(source, root or source.parent)
    elif source.suffix.lower() == ".txt":
        yield from _lines(source, Path(root or source.parent))
    elif source.suffix.lower() in SUFFIXES:
        yield source.name, source, sidecar(source)
    else:
        raise ValueError(f"{source} is neither a folder, nor a table, nor a video.")


def sidecar(video: Path) -> str:
    """Returns the caption in the .txt or .json file beside a video, or ""."""
    for file in (video.with_suffix(".txt"), video.with_suffix(".json")):
        if not file.exists():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".txt":
            return text.strip()
        row = parse_json(text, str(file))
        return _value(row, CAPTION_COLUMNS) if isinstance(row, dict) else ""
    return ""


def _lines(source: Path, root: Path) -> Iterator[tuple[str, Path, str]]:
    """Yields the items of a list of paths, with the list of captions beside it."""
    paths = [p for p in _text_lines(source.read_text(encoding="utf-8")) if p.strip()]
    captions = [""] * len(paths)
    for name in ("prompt.txt", "prompts.txt"):
        other = source.with_name(name)
        if other.exists() and other != source:
            captions = _text_lines(other.read_text(encoding="utf-8"))
            if len(captions) != len(paths):
                raise ValueError(
                    f"{other} has {len(captions)} lines and {source} {len(paths)}; "
                    "they must match line by line."
                )
    for path, caption in zip(paths, captions, strict=True):
        yield path.strip(), root / path.strip(), caption.strip()


def _table(table: Path, root: str | Path) -> Iterator[tuple[str, Path, str]]:
    """Yields the items of a table."""
    rows = _rows(table)
    columns = {str(name).lower() for row in rows[:100] for name in row}
    if rows and not columns & set(PATH_COLUMNS):
        raise ValueError(
            f"{table} has no column of paths; it has {sorted(columns)}, and a path is "
            f"one of {', '.join(PATH_COLUMNS)}."
        )
    for row in rows:
        path = _value(row, PATH_COLUMNS)
        if path:
            yield path, Path(root) / path, _value(row, CAPTION_COLUMNS)


def _text_lines(text: str) -> list[str]:
    """Splits at line feeds alone: captions may hold U+2028 and its like."""
    return list(io.StringIO(text))


def _rows(table: Path) -> list[Mapping[str, Any]]:
    """Reads a table of any of the known kinds."""
    kind = table.suffix.lower()
    if kind == ".parquet":
        columns = pq.read_schema(table).names
        wanted = {*PATH_COLUMNS, *CAPTION_COLUMNS}
        kept = [c for c in columns if c.lower() in wanted] or columns[:1]
        return pq.read_table(table, columns=kept).to_pylist()
    text = table.read_text(encoding="utf-8-sig")
    if kind in (".csv", ".tsv"):
        delimiter = "\t" if kind == ".tsv" else ","
        return list(csv.DictReader(_text_lines(text), delimiter=delimiter))
    if kind == ".jsonl":
        lines = enumerate(_text_lines(text), 1)
        return [
            parse_json(line, f"{table} line {number}", dict)
            for number, line in lines
            if line.strip()
        ]
    rows: Any = parse_json(text, str(table))
    if isinstance(rows, dict):  # {"a.mp4": "caption"} or {"a.mp4": {"caption": ..}}
        return [
            {"path": path} | (row if isinstance(row, dict) else {"caption": row})
            for path, row in rows.items()
        ]
    return parse_json(text, str(table), list[dict])


def _value(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """Returns the first of the named columns that is filled, as text."""
    lower = {str(name).lower(): value for name, value in row.items()}
    for name in names:
        value = lower.get(name)
        if isinstance(value, list):  # several captions: the first
            value = value[0] if value else None
        if value is not None and str(value).strip():
            return str(value).strip()
    return ""
