"""Atomic writes: a file is either whole or absent, whatever kills the process."""

import contextlib
import errno
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Messages of a full disk in other libraries' errors; the last is numpy's.
_SAY_SO = "|".join([*map(os.strerror, _NO_ROOM), r"\d+ requested and \d+ written"])
_LONGEST = 300  # most characters to quote of another library's message


class FullDiskError(OSError):
    """The disk, or the user's quota on it, is full."""


def local_path(path: str | Path) -> Path:
    """Returns a path on the local file system, with ~ expanded.

    Raises:
        ValueError: it is a URL. The record reader would accept `gs://`, but without
            network or credentials it blocks silently for minutes; a mounted bucket
            fails at once.
    """
    if match := re.match(r"([a-z][a-z0-9+.-]*)://([^/]*)", str(path)):
        raise ValueError(
            f"{path} is a URL, and records are read from a file system; mount it "
            f"first, e.g. `gcsfuse --implicit-dirs {match[2]} /mnt/{match[2]}`, and "
            f"pass /mnt/{match[2]}{str(path)[match.end() :]}."
        )
    return Path(path).expanduser()


def cache_folder() -> Path:
    """Where what can be made again is kept: `jvdit` in the user's cache folder.

    That is XDG_CACHE_HOME, or else ~/.cache.
    """
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jvdit"


def config_folder() -> Path:
    """Where what can't be made again is kept: `jvdit` in the user's config folder.

    That is XDG_CONFIG_HOME, or else ~/.config.
    """
    return Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "jvdit"


def temporary_path(path: Path) -> Path:
    """The path to write a file at before it is renamed to `path`."""
    return path.with_name(f".tmp@{socket.gethostname()}@{os.getpid()}@{path.name}")


@contextlib.contextmanager
def said_if_full(where: str | Path = "") -> Iterator[None]:
    """Converts any library's error about a full disk to a one-line `FullDiskError`.

    Args:
        where: the file being written, since libraries don't always name it.

    Raises:
        FullDiskError: the disk is full.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if told := _of_full_disk(error):
            raise FullDiskError(
                f"the disk is full{where and f' at {where}'}: {told}. Make room; the "
                "same command goes on."
            ) from error
        raise


def _of_full_disk(error: BaseException | None) -> str:
    """The message of an error, or of its cause, about a full disk; "" if none is."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in _NO_ROOM or re.search(_SAY_SO, text):
        return text if len(text) < _LONGEST else f"{text[:_LONGEST]} …"
    return _of_full_disk(error.__cause__ or error.__context__)


def check_writable(folder: Path) -> None:
    """Makes a folder and a file in it, and removes the file.

    Raises:
        OSError: no file can be written there.
    """
    write_atomically(probe := folder / "empty", b"")
    probe.unlink()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `path` unless an error is raised.

    Who may read the file is as for any other: safetensors would have it for its owner
    alone.

    Raises:
        FullDiskError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with said_if_full(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically: it is whole or absent, whatever kills the process."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sweep_temporary(directory: Path, *, max_age_seconds: float = 86400) -> list[str]:
    """Removes temporary files that dead processes left, and returns their names.

    Files of live processes on this host are kept. Processes of other hosts can't be
    seen from here, so their files are kept for a day.

    Args:
        directory: the folder, searched recursively.
        max_age_seconds: age at which a file of another host is removed.
    """
    swept = []
    for file in directory.rglob(".tmp@*"):
        if match := re.match(r"\.tmp@([^@]*)@(\d+)@", file.name):
            if match[1] == socket.gethostname():
                dead = not _is_running(int(match[2]))
            else:
                dead = time.time() - file.stat().st_mtime > max_age_seconds
            if dead:
                file.unlink(missing_ok=True)
                swept.append(file.name)
    return swept


def _is_running(pid: int) -> bool:
    """Whether a process with this id is running on this host."""
    try:
        os.kill(pid, 0)
    except OSError as error:  # PermissionError: it is somebody else's
        return not isinstance(error, ProcessLookupError)
    return True
