"""Which files go into which shard of a data set: by what they hold, ever the same.

What a file holds decides its split, so no picture of it is in two of them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from jvdit.data.ingest.clip_file import ClipFile

_SAMPLE = 2**20  # bytes hashed at either end of a file


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which files go into which shard, and which into none.

    Attributes:
        shards: items by (split, shard).
        refused: (item, reason, detail) of the files that are not even tried.
        digest: hash of all of it: a resumed job must find the same.
    """

    shards: Mapping[tuple[str, int], list[ClipFile]]
    refused: list[tuple[ClipFile, str, str]]
    digest: str

    @property
    def files(self) -> int:
        """Number of files, the refused ones included."""
        return len(self.refused) + sum(map(len, self.shards.values()))


def file_digest(path: str) -> str | None:
    """Returns a hash of a file's size, first and last megabyte; None if unreadable.

    A name with a NUL, or with half a character in it, is that of no file.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little") + file.read(_SAMPLE))
            file.seek(max(_SAMPLE, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def _digests(item: ClipFile) -> list[str | None]:
    """The digests of a file, and of what lies beside it."""
    return [*map(file_digest, (item.path, *item.beside.values()))]


def plan_shards(
    items: Sequence[ClipFile], *, val_fraction: float | int, shard_size: int
) -> Plan:
    """Assigns every file to a split, by its content, and to a shard.

    What is missing, or has a copy with the same caption, is refused.

    Args:
        items: the files, and what was found in the place of one.
        val_fraction: share of them, about, that goes to "val"; the rest to "train".
        shard_size: files of a shard.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"`val_fraction` (={val_fraction}) must be in [0, 1).")
    if shard_size < 1:
        raise ValueError(f"`shard_size` (={shard_size}) must be positive.")
    refused = [(item, item.reason, item.detail) for item in items if item.reason]
    items, seen = [item for item in items if not item.reason], {}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        digests = list(pool.map(_digests, items))
    by_split = {"train": [], "val": []}
    for item, found in zip(items, digests, strict=True):
        first = seen.setdefault((item.caption, *found), item)
        if None in found:
            files = (item.path, *item.beside.values())
            refused.append((item, "missing", files[found.index(None)]))
        elif first is not item:
            refused.append((item, "duplicate", f"of {first.key}"))
        else:
            held_out = int(str(found[0])[:8], 16) < val_fraction * 2**32
            by_split["val" if held_out else "train"].append(item)
    shards = {
        (split, start // shard_size): members[start : start + shard_size]
        for split, members in by_split.items()
        for start in range(0, len(members), shard_size)
    }
    names = [[item.key, item.caption] for item in items]
    beside = [[*x.beside, *y[1:]] for x, y in zip(items, digests, strict=True)]
    told = [beside] if any(beside) else []
    first = [found[0] for found in digests]
    identity = json.dumps([names, first, val_fraction, shard_size, *told])
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return Plan(shards, refused, digest)
