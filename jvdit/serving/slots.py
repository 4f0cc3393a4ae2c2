"""Places in rows of one static shape, which clips take and leave at any time.

A clip keeps its place until it leaves. Sums over a row add vectors of numbers, and
blocks of these: a clip begins at a multiple of `ALIGNED` tokens, and none lies across
an end of a `BLOCK` that it could lie before. So the same numbers are added in the same
order wherever it lies, and its bits don't depend on its neighbours.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np

from jvdit.data.items import Item

ALIGNED, BLOCK = 64, 256  # tokens: found by trial on CPUs, checked at every start
_NULL = "null_embeds"


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The one shape of all rows.

    Attributes:
        rows: how many.
        tokens: of pictures, in a row.
        sounds: tokens of sounds, in a row.
        clips: most clips of a row.
        text: most text states of a clip.
        text_width: channels of a text state.
        channels: of a token.
        cond: channels beside those of a token.
    """

    rows: int
    tokens: int
    sounds: int
    clips: int
    text: int
    text_width: int
    channels: int
    cond: int = 0

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many tokens of a row are of each kind; (): there is one."""
        return self.budgets if self.sounds else ()

    @property
    def levels(self) -> int:
        """Noise levels of each kind, of which the first is clean."""
        return self.clips + 1

    @property
    def budgets(self) -> tuple[int, int]:
        """Tokens of a row, of each kind."""
        return self.tokens, self.sounds


class RowSlot(NamedTuple):
    """The place of a clip.

    Attributes:
        row: its row.
        number: its number in the row, from 0.
        starts: its first token of each kind, among those of that kind.
        counts: its tokens of each kind.
    """

    row: int
    number: int
    starts: tuple[int, int]
    counts: tuple[int, int]


def blank_rows(shape: RowShape) -> dict[str, np.ndarray]:
    """Rows of padding, in the layout of `pack_rows`."""
    b, n = shape.rows, sum(shape.budgets)
    level = np.zeros((b, n), np.int32)
    level[:, shape.tokens :] = shape.levels
    text = (b, shape.clips * shape.text, shape.text_width)
    cond = {"cond": np.zeros((b, n, shape.cond), np.float32)} if shape.cond else {}
    return cond | {
        "latents": np.zeros((b, n, shape.channels), np.float32),
        "position": np.zeros((b, n, 3), np.float32),
        "segment": np.zeros((b, n), np.int32),
        "level": level,
        "text_embeds": np.zeros(text, np.float32),
        _NULL: np.zeros(text, np.float32),
        "text_segment": np.zeros(text[:2], np.int32),
        "null_segment": np.zeros(text[:2], np.int32),
    }


def places(shape: RowShape, slot: RowSlot) -> list[slice]:
    """Where the tokens of a clip lie in its row, for each kind."""
    firsts = (0, shape.tokens)
    return [
        slice(first + start, first + start + count)
        for first, start, count in zip(firsts, slot.starts, slot.counts, strict=True)
    ]


def put(
    arrays: dict[str, np.ndarray],
    shape: RowShape,
    slot: RowSlot,
    item: Item,
    null: Item,
) -> None:
    """Writes a clip's tokens and text to its place, as `pack_rows` lays them out.

    Args:
        arrays: from `blank_rows`, changed here.
        shape: of the rows.
        slot: the clip's place.
        item: the clip.
        null: the same with its negative prompt.
    """
    row, own = slot.row, slot.number + 1
    level = np.broadcast_to(item.level, len(item.latents))
    for kind, (place, (low, high)) in enumerate(
        zip(places(shape, slot), item.spans, strict=True)
    ):
        clean = kind * shape.levels
        width = item.latents.shape[1]
        arrays["latents"][row, place] = 0
        arrays["latents"][row, place, :width] = item.latents[low:high]
        if item.cond is not None:
            arrays["cond"][row, place] = item.cond[low:high]
        arrays["position"][row, place] = item.position[low:high]
        arrays["segment"][row, place] = own
        arrays["level"][row, place] = clean + np.where(level[low:high], own, 0)
    first = slot.number * shape.text
    for name, of in (("text", item), ("null", null)):
        words = slice(first, first + len(of.text))
        whole = slice(first, first + shape.text)
        arrays[f"{name}_segment"][row, whole] = 0
        arrays[f"{name}_segment"][row, words] = own
        arrays[f"{name}_embeds"][row, whole] = 0
        arrays[f"{name}_embeds"][row, words] = of.text


def clear(arrays: dict[str, np.ndarray], shape: RowShape, slot: RowSlot) -> None:
    """Turns a clip's place to padding again."""
    blank = blank_rows(dataclasses.replace(shape, rows=1))
    first = slot.number * shape.text
    text = slice(first, first + shape.text)
    for name, value in blank.items():
        of_text = name.startswith(("text", "null"))
        for place in [text] if of_text else places(shape, slot):
            arrays[name][slot.row, place] = value[0, place]


def find_slot(
    shape: RowShape,
    taken: Iterable[RowSlot],
    counts: tuple[int, int],
    closed: Collection[int] = (),
) -> RowSlot | None:
    """Finds a free place, the first that is large enough.

    Args:
        shape: of the rows.
        taken: the places of others.
        counts: tokens of each kind that are needed.
        closed: rows that are kept for others.
    """
    taken = [*taken]
    for row in range(shape.rows):
        if row in closed:
            continue
        there = [slot for slot in taken if slot.row == row]
        numbers = {*range(shape.clips)} - {slot.number for slot in there}
        starts: list[Any] = [_gap(shape, there, k, n) for k, n in enumerate(counts)]
        if numbers and None not in starts:
            return RowSlot(row, min(numbers), (starts[0], starts[1]), counts)
    return None


def _gap(
    shape: RowShape, there: Collection[RowSlot], kind: int, count: int
) -> int | None:
    """The first start of so many free tokens of a kind; None: there is none."""
    spans = [(x.starts[kind], x.counts[kind]) for x in there]
    for start in range(0, shape.budgets[kind] - count + 1, ALIGNED):
        within = start % BLOCK + count <= BLOCK or start % BLOCK == 0
        apart = all(start + count <= a or a + n <= start for a, n in spans if n)
        if within and apart:
            return start
    return None


def room_of_text(count: int) -> int:
    """The room of a text of so many states, none of which lies across a block's end."""
    room = ALIGNED
    while room < min(count, BLOCK):
        room *= 2
    return -(-count // room) * room


def soonest(shape: RowShape, left: dict[RowSlot, int], counts: tuple[int, int]) -> int:
    """The row in which so many tokens become free soonest, if nobody else enters.

    Args:
        shape: of the rows.
        left: for each place that is taken, the steps until it becomes free.
        counts: tokens of each kind that are needed.
    """
    for steps in sorted(set(left.values())):
        staying = [slot for slot, more in left.items() if more > steps]
        if (found := find_slot(shape, staying, counts)) is not None:
            return found.row
    return 0
