"""Files that are either whole or absent, whatever kills the process."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What libraries make of those: their words, or numpy's of a file that was cut short.
_SAY_SO = "|".join([*map(os.strerror, _NO_ROOM), r"\d+ requested and \d+ written"])
_LONGEST = 300  # characters of another's message


class FullDiskError(OSError):
    """There is no room left on a disk, or none within the user's quota."""


def local_path(path: str | Path) -> Path:
    """Returns `path` as a local path.

    Raises:
        ValueError: it is a URL. The record reader does understand `gs://`, but without
            network or credentials it blocks for minutes and says nothing; a mounted
            bucket fails at once and loudly.
    """
    if match := re.match(r"([a-z][a-z0-9+.-]*)://([^/]*)", str(path)):
        raise ValueError(
            f"{path} is a URL, and records are read from a file system; mount it "
            f"first, e.g. `gcsfuse --implicit-dirs {match[2]} /mnt/{match[2]}`, and "
            f"pass /mnt/{match[2]}{str(path)[match.end() :]}."
        )
    return Path(path).expanduser()


def temporary_path(path: Path) -> Path:
    """Returns where to write `path` before it is renamed into place."""
    return path.with_name(f".tmp@{socket.gethostname()}@{os.getpid()}@{path.name}")


@contextlib.contextmanager
def said_if_full(where: str | Path = "") -> Iterator[None]:
    """Turns what any library raises when a disk is full into one line.

    Args:
        where: the file, for libraries that don't say it.

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
    """What an error, or one behind it, says of a full disk; "" if nothing."""
    if error is None:
        return ""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in _NO_ROOM or re.search(_SAY_SO, text):
        return text if len(text) < _LONGEST else f"{text[:_LONGEST]} …"
    return _of_full_disk(error.__cause__ or error.__context__)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that becomes `path` unless something is raised.

    Raises:
        FullDiskError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with said_if_full(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is either whole or absent, whatever kills the process."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sweep_temporary(directory: Path, *, max_age_seconds: float = 86400) -> list[str]:
    """Removes what dead writers left, and returns the names.

    What a live process of this host writes is kept; of another host, whose processes
    cannot be seen from here, what is less than a day old.
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
    """Whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Holds a lock file, which the system lets go of when the process ends.

    Raises:
        ValueError: another process holds it, and is `doing` something.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is {doing}; wait for it or end it."
            ) from None
        yield
