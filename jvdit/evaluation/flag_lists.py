"""Lists of words to flag in captions: text files that anybody can edit.

A file is a list, named like the file. Each line holds a word or a phrase; what follows
a `#` is a comment.
"""

import collections
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jvdit.machine.text_files import read_text

_PAIRS = 40  # of words that are told


class Listed(NamedTuple):
    """What captions name of one list.

    Attributes:
        words: how many captions name each word or phrase.
        clips: numbers of the clips whose captions name any.
        share: of all captions.
    """

    words: dict[str, int]
    clips: list[int]
    share: float


def find_lists(names: Sequence[str] | None, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of lists.

    Args:
        names: files, or names of those in the folder; None: all of those.
        folder: holds lists.

    Raises:
        ValueError: a name is neither.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    if names is None:
        return [*known.values()]
    found = []
    for name in names:
        path = pathlib.Path(name)
        path = path if path.is_file() else known.get(name.removesuffix(".txt"))
        if path is None:
            raise ValueError(
                f"--flag_lists (={name!r}) is neither a file nor one of "
                f"{', '.join(known)}."
            )
        found.append(path)
    return found


def read_lists(paths: Iterable[str | os.PathLike[str]]) -> dict[str, tuple[str, ...]]:
    """Reads lists of words, each by the name of its file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a list is empty, has a line without a word, or has another's name.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path in map(pathlib.Path, paths):
        terms = {}
        for number, line in enumerate(read_text(path).splitlines(), 1):
            term = line.partition("#")[0].strip().casefold()
            if _parts(term):
                terms[term] = None
            elif term:
                raise ValueError(
                    f"{path}: line {number} (={line[:60]!r}) holds no word; write a "
                    "word or a phrase a line, and # before a comment."
                )
        if not terms:
            raise ValueError(f"{path} lists no word; write one a line, or omit it.")
        if path.stem in found:
            raise ValueError(
                f"{path}: another list is called {path.stem!r}; rename it."
            )
        found[path.stem] = (*terms,)
    return found


def named(
    captions: Mapping[int, str], lists: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Listed], dict[str, dict[str, int]]]:
    """What captions name of lists, and of two lists together.

    Args:
        captions: by the number of the clip.
        lists: words and phrases of each.

    Returns:
        What is named of each list; and in how many captions two lists are named
        together ("lists"), and two words of different lists ("words"), the most
        frequent first.
    """
    terms = [(name, x, _parts(x)) for name, each in lists.items() for x in each]
    longest = max((len(parts) for _, _, parts in terms), default=0)
    counts = {name: dict.fromkeys(each, 0) for name, each in lists.items()}
    clips: dict[str, list[int]] = {name: [] for name in lists}
    lists_together: collections.Counter[str] = collections.Counter()
    words_together: collections.Counter[str] = collections.Counter()
    for number, caption in captions.items():
        said = _phrases(_parts(caption), longest)
        here = [(name, term) for name, term, parts in terms if parts in said]
        for name, term in here:
            counts[name][term] += 1
        names = dict.fromkeys(name for name, _ in here)
        for name in names:
            clips[name].append(number)
        lists_together.update(map(_pair, itertools.combinations(names, 2)))
        words_together.update(
            {
                _pair((a, b))
                for (one, a), (other, b) in itertools.combinations(here, 2)
                if one != other and a != b
            }
        )
    total = max(len(captions), 1)
    found = {k: Listed(counts[k], x, len(x) / total) for k, x in clips.items()}
    return found, {
        "lists": dict(lists_together.most_common()),
        "words": dict(words_together.most_common(_PAIRS)),
    }


def _pair(names: Any) -> str:
    return " + ".join(sorted(names))


def _parts(text: str) -> tuple[str, ...]:
    """The words and numbers of a text, in any script, without regard to case."""
    return (*re.findall(r"[^\W_]+", text.casefold()),)


def _phrases(words: Sequence[str], longest: int) -> set[tuple[str, ...]]:
    """All runs of words up to a length."""
    lengths = range(1, longest + 1)
    return {(*words[i : i + n],) for n in lengths for i in range(len(words) - n + 1)}
