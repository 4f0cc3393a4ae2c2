"""Digests of checkpoint files, to detect damage.

Orbax protects its indices with checksums but not the numbers: a flipped bit on a disk,
or a block of zeros in the place of a lost one, would be restored silently. So each
process lists the digests of the files it wrote, in `digests.PROCESS.json` beside the
state.

The cost: a core hashes about 1 GB/s (blake2b), and each process hashes up to four
files, of 2 GB at most, at a time. A state of 224 GB (14B parameters, their average and
two moments in float32) on 16 hosts takes each host about 4 s after every save, in the
background and mostly from the page cache, and a second read of 14 GB when restored.
"""

import hashlib
import json
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import msgspec

from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import read_json

_NAME = "digests.{}.json"
_THREADS = 4  # that hash files, beside the threads that train
_BYTES = 16  # length of a digest


class _Listing(msgspec.Struct, frozen=True):
    """A digests file: the size and the digest of each file that a process wrote."""

    processes: int
    files: dict[str, tuple[int, str]]


def write_digests(folder: pathlib.Path, process: int, processes: int) -> None:
    """Writes the digests of the files that this process wrote to a checkpoint.

    Args:
        folder: the finished checkpoint; it must exist.
        process: index of this process. Process 0 also lists the shared files.
        processes: how many processes there are.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not file.match(f"*{_NAME.format('*')}*")
        and _writer(file, folder) == process
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(files, pool.map(_digest, files), strict=True)
    listed = {
        file.relative_to(folder).as_posix(): [file.stat().st_size, digest]
        for file, digest in found
    }
    listing = json.dumps({"processes": processes, "files": listed}).encode()
    write_atomically(folder / _NAME.format(process), listing)


def find_damage(folder: pathlib.Path, process: int = 0, processes: int = 1) -> str:
    """Compares the files of a checkpoint with their digests.

    Files without a digest aren't checked: the process that wrote them was an older
    version, or was killed before it listed them.

    Args:
        folder: the checkpoint.
        process: index of this process; each checks a part of the files.
        processes: how many processes there are now, not when it was written.

    Returns:
        One line that says what is damaged; "" if nothing is.
    """
    try:
        listed = sorted(_listed(folder)[0].items())[process::processes]
    except (OSError, ValueError) as error:
        return f"its digests can't be read: {error}"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _damage(folder, item[0], *item[1]), listed)
        return next(filter(None, found), "")


def is_listed(folder: pathlib.Path) -> bool:
    """Whether every process that wrote a checkpoint has listed its files."""
    found, processes = _listed(folder)
    return bool(found) and len([*folder.glob(_NAME.format("*"))]) == processes


def _listed(folder: pathlib.Path) -> tuple[dict[str, tuple[int, str]], int]:
    """Sizes and digests of the files by name, and how many processes there were."""
    found, processes = {}, 0
    for part in sorted(folder.glob(_NAME.format("*"))):
        listing = read_json(part, "delete it", _Listing)
        found, processes = found | listing.files, listing.processes
    return found, processes


def _damage(folder: pathlib.Path, name: str, size: int, digest: str) -> str:
    try:
        held = (folder / name).stat().st_size
        if held != size:
            return f"{name} has {held} bytes and should have {size}"
        same = _digest(folder / name) == digest
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read: {error}"
    return "" if same else f"{name} has changed since it was written"


def _writer(file: pathlib.Path, folder: pathlib.Path) -> int:
    """Which process wrote a file: orbax has a folder for each."""
    name = file.relative_to(folder).as_posix()
    owned = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
    return int(owned[1]) if owned else 0


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=_BYTES))
    return found.hexdigest()
