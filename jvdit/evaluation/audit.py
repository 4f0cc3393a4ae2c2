"""What a data set of clips holds: counts, faults, doubles, and what its captions name.

Every number is of the clips that were read, a sample spread evenly over each split. It
says what is there by plain measures; it judges neither licences nor consent, sees no
faces, and reads captions word by word.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jvdit.data.clips import SIZE, BadClip, Source
from jvdit.evaluation.flag_lists import Listed, named

_SIDE = 8  # of the pictures by which clips are compared
_ALIKE = 0.985  # correlation from which clips are doubles
_PLAIN = 2.0  # deviation, of 255, below which a clip has nothing to compare
_STILL = 1.5  # largest change of a cell, of 255, from frame to frame if nothing moves
_BLACK = 8.0  # mean brightness, of 255, of a frame that shows nothing
_CUT = 24.0  # difference, of 255, that may be a cut, if it is many times the others
_MANY = 6.0
_SILENT = 1e-3  # root mean square of a sound, of 1, that isn't heard
_BLOCK = 1024  # clips that are compared with all others at once


@dataclasses.dataclass
class Audit:
    """What was found in one split.

    Attributes:
        name: of the source.
        clips: how many it has.
        read: how many were read.
        seconds: that all of them last, from the index.
        sizes, rates: how many clips have each size, and each frame rate.
        faults: how many couldn't be read, by reason.
        flagged: numbers of clips that are still, black, cut, silent or clipped.
        captions: counts and lengths of captions, and the most frequent words.
        lists: what captions name of each list of words.
        together: in how many two lists, and two words of different lists, are named.
        codes: of each clip that was read, by its number; see `code`.
    """

    name: str
    clips: int
    read: int
    seconds: float
    sizes: dict[str, int]
    rates: dict[str, int]
    faults: dict[str, int]
    flagged: dict[str, list[int]]
    captions: dict[str, Any]
    lists: dict[str, Listed]
    together: dict[str, dict[str, int]]
    codes: dict[int, np.ndarray]


def audit(
    name: str, source: Source, most: int, lists: Mapping[str, Sequence[str]]
) -> Audit:
    """Reads clips of a source, spread evenly over it, and says what they are.

    Args:
        name: of the source.
        source: of pixels.
        most: how many clips to read at the most.
        lists: words to flag in captions, as `read_lists` returns them.
    """
    index, count = source.index, len(source)
    ids = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    flagged = collections.defaultdict(list)
    faults: collections.Counter[str] = collections.Counter()
    captions, codes = {}, {}
    for i in ids.tolist():
        (clip,) = source.read([i])
        if isinstance(clip, BadClip):
            faults[clip.reason] += 1
            continue
        captions[i] = clip.get("caption", "")
        codes[i] = code(clip["video"])
        for flag in flags_of(clip):
            flagged[flag].append(i)
    columns = zip(*(index[x] for x in SIZE), strict=True)
    sizes = collections.Counter("x".join(map(str, x)) for x in columns)
    rates = collections.Counter(f"{x:g}" for x in index["fps"])
    told, pairs = named(captions, lists)
    return Audit(
        name,
        count,
        len(ids),
        float((index["frames"] / index["fps"]).sum()),
        dict(sizes.most_common()),
        dict(rates.most_common()),
        dict(faults.most_common()),
        {k: flagged[k] for k in sorted(flagged)},
        captions_of([*captions.values()]),
        told,
        pairs,
        codes,
    )


# Pictures and sound


def flags_of(clip: Mapping[str, Any]) -> list[str]:
    """What a clip may be left out for: still, black, cut, silent, clipped."""
    video, audio = clip["video"], clip.get("audio")
    small = _small(video)
    found = []
    if (video.mean((1, 2, 3)) < _BLACK).mean() > 0.5:
        found.append("black")
    changes = np.abs(np.diff(small.mean(-1), axis=0))
    if changes.size and changes.max() < _STILL:
        found.append("still")
    steps = changes.mean((1, 2))
    usual = np.median(steps) if len(steps) else 0.0
    if len(steps) > 2 and steps.max() > max(_CUT, _MANY * usual):
        found.append("cut")
    if clip.get("has_audio") and audio is not None:
        if math.sqrt(float(np.square(audio).mean())) < _SILENT:
            found.append("silent")
        if (np.abs(audio) >= 0.999).mean() > 1e-3:
            found.append("clipped")
    return found


def _small(video: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "T _h _w 3"]:
    """Frames as `_SIDE` x `_SIDE + 1` means of their pixels."""
    _, height, width, _ = video.shape
    sides = (height, _SIDE), (width, _SIDE + 1)
    rows, columns = (np.linspace(0, n, k + 1).astype(int)[:-1] for n, k in sides)
    sums = np.add.reduceat(video.astype(np.float32), rows, axis=1)
    sums = np.add.reduceat(sums, columns, axis=2)
    counts = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    return sums / counts[..., None]


def code(video: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, "k"]:
    """The first, the middle and the last frame, small, as a vector of length 1.

    The inner product of two is their correlation, which hardly changes with brightness,
    contrast, size or compression. Zeros: there is nothing to be seen.
    """
    cells = _small(video[[0, len(video) // 2, -1]]).reshape(-1)
    cells = cells - cells.mean()
    if cells.std() < _PLAIN:
        return np.zeros(len(cells), np.float32)
    return (cells / np.linalg.norm(cells)).astype(np.float32)


def doubles(parts: Sequence[Audit]) -> list[tuple[str, int, str, int, float]]:
    """Clips that look alike, within a split and across splits.

    Returns:
        Source and number of both, and their correlation; the most alike first.
    """
    names = [(part.name, i) for part in parts for i in part.codes]
    if not names:
        return []
    codes = np.stack([x for part in parts for x in part.codes.values()])
    found = []
    for start in range(0, len(codes), _BLOCK):
        alike = codes[start : start + _BLOCK] @ codes.T
        for i, j in np.argwhere(alike >= _ALIKE):
            first, second = start + int(i), int(j)
            if first < second:
                value = round(float(alike[i, j]), 4)
                found.append((*names[first], *names[second], value))
    return sorted(found, key=lambda x: -x[-1])


# Captions


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case, in any script."""
    return re.findall(r"[^\W\d_]+", caption.lower())


def captions_of(captions: Sequence[str], most: int = 30) -> dict[str, Any]:
    """Counts and lengths of captions, and the words that most of them have."""
    lengths = np.array([len(words_of(x)) for x in captions] or [0])
    repeated = collections.Counter(x for x in captions if x.strip())
    having = collections.Counter(word for x in captions for word in {*words_of(x)})
    return {
        "empty": sum(not x.strip() for x in captions),
        "different": len(repeated),
        "most repeated": dict(repeated.most_common(5)),
        "words": {
            "least": int(lengths.min()),
            "median": float(np.median(lengths)),
            "most": int(lengths.max()),
        },
        "vocabulary": len(having),
        "most frequent": dict(having.most_common(most)),
    }


def spread(counts: Int[np.ndarray, "k"]) -> float:
    """How evenly counts are spread: 1 if all are equal, 0 if there is only one.

    The entropy of the shares, by its greatest.
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    if len(counts) < 2 or not len(shares):
        return math.nan
    return float(-(shares * np.log(shares)).sum() / math.log(len(counts)))
