"""Lists of videos with captions, in every form that people keep them.

Nothing of a folder or table is dropped silently: what isn't taken is listed with its
reason.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jvdit.data.ingest.clip_file import ClipFile
from jvdit.data.ingest.tables import (
    CAPTION_LISTS,
    TABLES,
    caption_of,
    read_list,
    read_table,
)
from jvdit.data.media.pictures import PICTURES
from jvdit.data.media.reader import VIDEOS
from jvdit.machine.files import local_path
from jvdit.machine.json_files import parse_json
from jvdit.machine.text_files import check_text, printable, read_text

_MEDIA = VIDEOS | PICTURES
_BESIDE = {".guide": _MEDIA, ".camera": (".json",)}
# What a folder's own list is called, the first one that is there.
_LISTS = (*(f"metadata{x}" for x in TABLES), "videos.txt", "video.txt")


def list_items(
    inputs: Iterable[str | Path], *, root: str | Path | None = None
) -> list[ClipFile]:
    """Lists the videos and pictures of folders, tables and single files, by key.

    A folder may hold `metadata.{jsonl,csv,tsv,parquet,json}` (the Hugging Face
    videofolder layout) or `videos.txt` and `prompt.txt` (finetrainers); else every
    video and picture in it or below is taken, with the caption in the `.txt` (or
    `.json`) file of the same name. `NAME.guide.mp4` beside `NAME.mp4` is its guide, a
    second video, and `NAME.camera.json` the path of its camera. Linked folders are
    followed. A table has a column of paths and, usually, one of captions; see
    `PATH_COLUMNS`, `CAPTION_COLUMNS` and, for what lies beside, `BESIDE_COLUMNS`. A
    `.txt` file is a list of paths, one a line; a second file `prompt.txt` beside it
    then holds the captions. Rows that say the same thing twice count once.

    Args:
        inputs: folders, tables, videos and pictures.
        root: what relative paths in tables are relative to; None: the table's folder.

    Returns:
        The items, and what can't be one with its reason.

    Raises:
        FileNotFoundError: an input does not exist.
        ValueError: an input is of no known form, a table can't be read, or there is no
            video at all.
    """
    found: dict[ClipFile, str] = {}
    for entry in inputs:
        source = local_path(entry)
        if not source.exists():
            raise FileNotFoundError(f"There is no {source}.")
        for item in _items_of(source, root):
            found.setdefault(item._replace(key=""), printable(item.key))
    if all(item.reason for item in found):
        told = [f"; {name}: {x.detail or x.reason}" for x, name in found.items()]
        raise ValueError(
            f"No video in {', '.join(map(str, inputs))}; expected a folder of "
            f"{'/'.join(sorted(_MEDIA))} files, or a table ({', '.join(TABLES)}) with "
            f"a column of paths{''.join(told[:1])}"
        )
    items: dict[str, ClipFile] = {}
    for item, name in sorted(found.items(), key=lambda e: (e[1], e[0])):
        key, copies = name, 1
        while key in items:  # one file with several captions, or one name twice
            copies += 1
            key = f"{name}~{copies}"
        items[key] = item._replace(key=key)
    return [*items.values()]


def holds_videos(folder: Path) -> bool:
    """Whether a folder holds videos, or is one, that aren't prepared yet."""
    if not folder.is_dir():
        return folder.suffix.lower() in VIDEOS and folder.exists()
    return any(path.suffix.lower() in VIDEOS for path, _, _ in _walk(folder, set()))


def _items_of(source: Path, root) -> Iterator[ClipFile]:
    """Yields the items of one input; their keys needn't be unique yet."""
    if source.is_dir():
        yield from _folder(source, root)
    elif source.suffix.lower() in TABLES:
        yield from read_table(source, Path(root or source.parent))
    elif source.suffix.lower() == ".txt":
        yield from read_list(source, Path(root or source.parent))
    elif source.suffix.lower() in _MEDIA:
        beside = _beside([source, *_near(source)])
        if str(source) in {path for each in beside.values() for path in each.values()}:
            detail = f"it is the guide of {next(iter(beside)).name}"
            yield ClipFile(source.name, str(source), "", "other", detail)
        else:
            yield _item(source, source.name, [])._replace(**beside.get(source, {}))
    else:
        raise ValueError(f"{source} is neither a folder, nor a table, nor a video.")


def _folder(folder: Path, root) -> Iterator[ClipFile]:
    """Yields what is in a folder: every file of it."""
    listed: set[str] = set()
    table = next((folder / x for x in _LISTS if (folder / x).is_file()), None)
    if table is not None:
        listed.update(map(str, (table, *map(table.with_name, CAPTION_LISTS))))
        for item in _items_of(table, root):
            listed.update(map(os.path.normpath, (item.path, *item.beside.values())))
            yield item
    files = [x for x in _walk(folder, set()) if str(x[0]) not in listed]
    beside = {} if table else _beside([x for x, *_ in files])
    taken = {path for each in beside.values() for path in each.values()}
    files = [x for x in files if str(x[0]) not in taken]
    filmed = {x.with_suffix("") for x, *_ in files if x.suffix.lower() in VIDEOS}
    used: list[Path] = []  # files that hold captions
    others: list[ClipFile] = []
    for path, reason, detail in files:
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.name in _LISTS and not detail:
            detail = "it is the list of another folder; give that one as an input"
        if suffix not in _MEDIA:
            reason = reason or "other"
        elif table is not None and not reason:
            reason, detail = "unlisted", f"{table.name} doesn't name it"
        elif suffix in PICTURES and path.with_suffix("") in filmed and not reason:
            reason, detail = "other", "a video of the same name is there"
        if reason:
            others.append(ClipFile(name, str(path), "", reason, detail))
        else:
            yield _item(path, name, used)._replace(**beside.get(path, {}))
    yield from (item for item in others if Path(item.path) not in used)


def _beside(files: Sequence[Path]) -> dict[Path, dict[str, str]]:
    """The guide and the camera beside each video or picture that has them."""
    media = {x.with_suffix(""): x for x in files if x.suffix.lower() in PICTURES}
    media |= {x.with_suffix(""): x for x in files if x.suffix.lower() in VIDEOS}
    found: dict[Path, dict[str, str]] = {}
    for file in files:
        whole, suffix = file.with_suffix(""), file.suffix.lower()
        what = whole.suffix.lower()
        fits = suffix in _BESIDE.get(what, ())
        if fits and (owner := media.get(whole.with_suffix(""))):
            found.setdefault(owner, {})[what[1:]] = str(file)
    return found


def _near(path: Path) -> list[Path]:
    """The files that may lie beside a video or picture, or that it may lie beside.

    They are asked for by their names: of `prepare_clips folder/*.mp4` each file is an
    input, and listing the folder for each would take long.
    """
    stem = path.with_suffix("")
    names = [f"{stem.name}.guide{x}" for x in sorted(_MEDIA)]
    names.append(f"{stem.name}.camera.json")
    if stem.suffix.lower() == ".guide":
        names += [stem.stem + x for x in sorted(_MEDIA)]
    return [x for name in names if (x := path.with_name(name)).is_file()]


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, str, str]]:
    """Yields (file, reason, detail) of a folder and those below, each folder once."""
    try:
        status = folder.stat()
        if (identity := (status.st_dev, status.st_ino)) in seen:
            yield folder, "duplicate", "this folder was listed by another path"
            return
        seen.add(identity)
        if any((folder / x).exists() for x in ("manifest.json", "_work/plan.json")):
            yield folder, "other", "it is a prepared data set"
            return
        # Links come last, so that a folder is listed under its own name if it can be.
        paths = sorted(folder.iterdir(), key=lambda x: (x.is_symlink(), x.name))
    except OSError as error:
        yield folder, "unreadable", str(error.strerror)
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.exists() and not path.is_file():
            yield path, "other", "it is no regular file"
        else:
            yield path, "", ""


def _item(path: Path, name: str, used: list[Path]) -> ClipFile:
    """A video with the caption beside it, whose file is added to `used`."""
    try:
        return ClipFile(name, str(path), _sidecar(path, used))
    except (OSError, ValueError) as error:
        return ClipFile(name, str(path), "", "bad_caption", str(error))


def _sidecar(video: Path, used: list[Path]) -> str:
    """Returns the caption in the .txt or .json file beside a video, or ""."""
    for suffix in (".txt", ".TXT", ".json", ".JSON"):
        if not (file := video.with_suffix(suffix)).is_file():
            continue
        used.append(file)
        text = check_text(read_text(file), str(file))
        if suffix.lower() == ".txt":
            return text.strip()
        return caption_of(parse_json(text, str(file), dict), str(file))
    return ""
