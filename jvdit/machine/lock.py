"""Folder locks: one run at a time in a folder, on one host or many.

The lock is a file, `.lock`, that names its holder. On the holder's own host the system
tells whether it is alive (`flock`), so that the lock of a killed run is free at once.
Other hosts see only its heartbeat, the file's modification time: they take the lock
after watching it unchanged for longer than a live holder can be silent. Clocks of
different hosts are never compared.
"""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import uuid
from typing import IO

import msgspec

from jvdit.machine.json_files import parse_json

_BEAT = 10.0  # seconds between two heartbeats
_SILENCE = 60.0  # seconds without a heartbeat after which a holder counts as dead
_SETTLING = 2.0  # seconds in which two successors of a dead holder see each other
_PAUSE = 1.0  # seconds between two looks at the file
_UNKNOWN = "a process that has just begun"
_Seen = tuple[bytes | None, int, int]
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
# Temporary files and folders, of this and of earlier versions.
_SCRATCH = re.compile(r"\.tmp@[^@]*@\d+@.*|.+\.\d+(\.\d)?\.tmp")


class _Holder(msgspec.Struct, frozen=True):
    """The holder of a folder, as its lock file names it."""

    host: str
    pid: int
    since: str
    place: str = ""
    token: str = ""

    def __str__(self):
        return f"process {self.pid} on {self.host}, since {self.since}"


class FolderLock:
    """A lock that one run holds on a folder.

    Args:
        folder: the folder, created if needed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = pathlib.Path(folder) / ".lock"
        self._token = b""
        self._file: IO[bytes] | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the lock; if a dead run on another host holds it, after a minute.

        Raises:
            ValueError: another run holds the folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        place = _place(self.path.parent)
        while self._file is None:
            file = self.path.open("a+b", buffering=0)
            with contextlib.ExitStack() as undo:
                undo.callback(file.close)
                alone, seen = _flock(file), self._seen()
                holder = _parsed(seen[0])
                if seen[0] is None or seen[2] != os.fstat(file.fileno()).st_ino:
                    continue  # it was released meanwhile
                near = not seen[0] or (holder is not None and holder.place == place)
                if alone is False and near and holder:
                    raise ValueError(self._refusal(holder))
                # No other process of this host holds the file, and no other host did.
                certain = alone is True and near
                watched = seen[0] or alone is False
                if not certain and watched and not self._silent(holder, seen):
                    continue
                undo.pop_all()
            self._file = file
            self._write(place)
            if not certain:
                time.sleep(_SETTLING)
                self.check()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def held(self) -> bool:
        """Whether this run holds the lock."""
        return self._file is not None and self._seen()[0] == self._token

    def check(self) -> None:
        """Raises a ValueError if another run has taken the lock, believing us dead."""
        content = self._seen()[0]
        if self._token and content and content != self._token:
            raise ValueError(self._refusal(_parsed(content)))

    def release(self) -> None:
        """Releases the lock, if this run holds it."""
        self._released.set()
        if self._file is not None:
            if self.held:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _seen(self) -> _Seen:
        """The file's contents (None if it is gone), modification time and inode."""
        try:  # opened anew: so NFS asks its server
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                return file.read(), state.st_mtime_ns, state.st_ino
        except FileNotFoundError:
            return None, 0, 0

    def _silent(self, holder: _Holder | None, seen: _Seen) -> bool:
        """Whether the holder shows no heartbeat; False if it has released the lock."""
        print(
            f"{self.path.parent} was held by {holder or _UNKNOWN}: waiting up to "
            f"{_SILENCE:g} s to see whether that lives.",
            flush=True,
        )
        deadline = time.monotonic() + _SILENCE
        while time.monotonic() < deadline:
            time.sleep(_PAUSE)
            now = self._seen()
            if now[0] is None:
                return False
            if now != seen:
                raise ValueError(self._refusal(_parsed(now[0])))
        return True

    def _write(self, place: str) -> None:
        ours = socket.gethostname(), os.getpid(), time.strftime("%F %T %Z")
        self._token = msgspec.json.encode(_Holder(*ours, place, uuid.uuid4().hex))
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(self._token)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            # A file system may be unavailable for a while.
            with contextlib.suppress(OSError):
                if self.held:
                    os.utime(self.path)

    def _refusal(self, holder: _Holder | None) -> str:
        return (
            f"{self.path.parent} is held by another run ({holder or _UNKNOWN}); wait "
            "for it, end it, or choose another folder."
        )


def _parsed(content: bytes | None) -> _Holder | None:
    try:
        return parse_json(content or b"", ".lock", _Holder)
    except ValueError:  # it is being written
        return None


def _place(folder: pathlib.Path) -> str:
    """Identifies a kernel and a mounted file system, within which `flock` works."""
    kernel = _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()
    return f"{kernel} {folder.stat().st_dev}"


def _flock(file: IO[bytes]) -> bool | None:
    """Tries to lock a file on this host.

    Returns:
        True if it is locked now, False if another process has it, None if this file
        system doesn't support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(workdir: str | os.PathLike[str]) -> None:
    """Removes temporary files that killed processes left in a workdir.

    Only the run that holds the workdir's lock may call this.
    """
    folder = pathlib.Path(workdir)
    found = [*folder.glob("*")]
    for name in ("model", "samples"):
        found += (folder / name).rglob("*")
    left = [path for path in found if _SCRATCH.fullmatch(path.name)]
    left += (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
