"""Tokens of several clips to the rows of one batch, and back.

Training packs clips with it, and sampling packs requests.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jvdit.data.items import POINT_LOGVAR, Item
from jvdit.data.patches import Size, token_grid, unpatchify

_OPEN_ROWS = 512  # rows that best fit chooses from

# What only some batches have of each token.
_EXTRAS = ("cond", "control")


def best_fit(
    needs: Sequence[Sequence[int]], budgets: Sequence[int], max_clips: int
) -> list[list[int]]:
    """Packs items in order, each into the fullest row that takes it.

    Args:
        needs: what each item takes of every budget; rows are filled by the first.
        budgets: of a row: tokens, and whatever else is bounded.
        max_clips: most items of a row.

    Returns:
        The items of each row.
    """
    smallest = min((need[0] for need in needs), default=0)
    rows: list[list[int]] = []
    others: list[list[int]] = []  # room of each row but for tokens
    room: list[tuple[int, int]] = []  # (token room, row) of the open rows, sorted
    for item, (need, *more) in enumerate(needs):
        at = bisect.bisect_left(room, (need, -1))
        while at < len(room) and any(map(operator.lt, others[room[at][1]], more)):
            at += 1
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = budgets[0], len(rows)
            rows.append([])
            others.append(list(budgets[1:]))
        rows[row].append(item)
        left -= need
        others[row] = list(map(operator.sub, others[row], more))
        if left >= smallest and len(rows[row]) < max_clips:
            bisect.insort(room, (left, row))
            if len(room) > _OPEN_ROWS:
                room.pop(0)
    return rows


def pack_rows(
    rows: Sequence[Sequence[Item]],
    token_budget: int,
    text_budget: int,
    max_clips: int,
    sound_budget: int = 0,
    channels: int = 0,
) -> dict[str, np.ndarray]:
    """Puts items side by side in rows of one static shape.

    The first `token_budget` tokens of a row are pictures' and the last `sound_budget`
    sounds', so that what only one kind goes through is applied to a slice. Each kind
    has `max_clips` + 1 noise levels, of which the first is clean.

    Args:
        rows: the items of each row, in order.
        token_budget: tokens of pictures in a row.
        text_budget: text tokens of a row, s.
        max_clips: most items of a row, m.
        sound_budget: tokens of sounds in a row.
        channels: least width of a token; narrower ones are padded with zeros.

    Returns:
        `latents`, `logvar` [b n c], `position` [b n 3], `segment`, `level` [b n],
        `text_ids` [b s] or `text_embeds` [b s e], `text_segment` [b s], `valid` [b m],
        `clip_id` [b m] (-1: empty place), and `cond` [b n u], `control` [b n v],
        `image` [b i z] where items have them. Item i of a row is
        segment i + 1 in its tokens and in its text; the level of its tokens that are
        generated is i + 1 in pictures, m + i + 2 in sounds. Segment 0 is padding, whose
        latents are zero; padding and what is given is at the clean level of its kind.

    Raises:
        ValueError: a row exceeds one of the bounds, or there is no item.
    """
    items = [item for row in rows for item in row]
    if not items:
        raise ValueError("`rows` holds no item, so the width of a token is unknown.")
    budgets = (token_budget, sound_budget)
    for row in rows:
        _check_row(row, budgets, text_budget, max_clips)
    width = max(channels, *(item.latents.shape[1] for item in items))
    batch = _blank(items, len(rows), (sum(budgets), text_budget, max_clips), width)
    batch["level"][:, token_budget:] = max_clips + 1
    if items[0].image is not None:
        batch["image"] = np.stack([row[0].image for row in rows])
    for r, row in enumerate(rows):
        _fill({name: values[r] for name, values in batch.items()}, row, token_budget)
    return batch


def _fill(blank: dict[str, np.ndarray], row: Sequence[Item], token_budget: int) -> None:
    """Puts items side by side in a blank row: in each kind's part, and in its text."""
    text = "text_ids" if "text_ids" in blank else "text_embeds"
    ends, word = [0, token_budget], 0
    for i, item in enumerate(row):
        level = np.broadcast_to(item.level, len(item.latents))
        words = slice(word, word + len(item.text))
        word = words.stop
        blank["valid"][i], blank["clip_id"][i] = item.valid, item.clip_id
        if item.valid:
            blank["text_segment"][words], blank[text][words] = i + 1, item.text
        for kind, (low, high) in enumerate(item.spans):
            place = slice(ends[kind], ends[kind] + high - low)
            ends[kind] = place.stop
            if not item.valid:
                continue
            clean = kind * (len(blank["valid"]) + 1)  # the level of what is given
            blank["segment"][place] = i + 1
            blank["level"][place] = clean + np.where(level[low:high], i + 1, 0)
            for name in ("latents", "logvar", "position", *_EXTRAS):
                if (value := getattr(item, name)) is not None and name in blank:
                    part = value[low:high]
                    blank[name][(place, *map(slice, part.shape[1:]))] = part


def _check_row(
    row: Sequence[Item], budgets: Sequence[int], text_budget: int, max_clips: int
) -> None:
    """Raises a ValueError if the items don't fit in a row."""
    tokens, sounds = (
        sum(high - low for low, high in (item.spans[kind] for item in row))
        for kind in range(2)
    )
    for name, size, budget in (
        ("token_budget", tokens, budgets[0]),
        ("sound_budget", sounds, budgets[1]),
        ("text_budget", sum(len(item.text) for item in row), text_budget),
        ("max_clips", len(row), max_clips),
    ):
        if size > budget:
            raise ValueError(
                f"A row needs {size} of `{name}` (={budget}); raise it, or put "
                f"fewer or smaller clips in it than {[x.clip_id for x in row]}."
            )


def _blank(
    items: Sequence[Item], b: int, sizes: tuple[int, int, int], width: int
) -> dict[str, np.ndarray]:
    """Rows of padding, with all that the items have."""
    for key in (*_EXTRAS, "image"):
        if len({getattr(item, key) is None for item in items}) > 1:
            raise ValueError(f"Some items have `{key}` and others have not.")
    n, s, m = sizes
    text = items[0].text
    ids = text.ndim == 1
    batch: dict[str, np.ndarray] = {
        "latents": np.zeros((b, n, width), np.float32),
        "logvar": np.full((b, n, width), POINT_LOGVAR, np.float32),
        "position": np.zeros((b, n, 3), np.float32),
        "segment": np.zeros((b, n), np.int32),
        "level": np.zeros((b, n), np.int32),
        "text_ids" if ids else "text_embeds": np.zeros(
            (b, s, *text.shape[1:]), np.int32 if ids else np.float32
        ),
        "text_segment": np.zeros((b, s), np.int32),
        "valid": np.zeros((b, m), np.bool_),
        "clip_id": np.full((b, m), -1, np.int64),
    }
    for key in _EXTRAS:
        if (value := getattr(items[0], key)) is not None:
            batch[key] = np.zeros((b, n, *value.shape[1:]), value.dtype)
    return batch


def unpack_rows(
    tokens: Shaped[Any, "b n p"],
    latent_sizes: Sequence[Sequence[Size]],
    patch_size: Size,
    channels: int,
    beside: Sequence[Sequence[int]] | None = None,
) -> list[list[Shaped[np.ndarray, "f h w c"]]]:
    """Takes rows apart into the pictures' latents of their items; undoes `pack_rows`.

    Args:
        tokens: such as the `latents` of a batch after denoising.
        latent_sizes: those of each item of each row.
        patch_size: latent frames, height and width of a token.
        channels: of a latent.
        beside: tokens that are given beside each item; None: there are none.
    """
    rows, width = [], channels * math.prod(patch_size)
    more = beside or [[0] * len(sizes) for sizes in latent_sizes]
    each = zip(np.asarray(tokens)[..., :width], latent_sizes, more, strict=True)
    for row, sizes, given in each:
        start, items = 0, []
        for size, others in zip(sizes, given, strict=True):
            count = math.prod(token_grid(size, patch_size))
            items.append(unpatchify(row[start : start + count], size, patch_size))
            start += count + others
        rows.append(items)
    return rows


def unpack_sounds(
    tokens: Shaped[Any, "b n p"],
    counts: Sequence[Sequence[int]],
    sound_budget: int,
    channels: int,
) -> list[list[Shaped[np.ndarray, "_ c"]]]:
    """Takes rows apart into the sounds' latents of their items.

    Args:
        tokens: such as the `latents` of a batch after denoising.
        counts: tokens of the sound of each item of each row.
        sound_budget: of the batch.
        channels: of a latent.
    """
    rows, first = [], tokens.shape[1] - sound_budget
    sounds = np.asarray(tokens)[:, first:, :channels]
    for row, sizes in zip(sounds, counts, strict=True):
        ends = np.cumsum([0, *sizes])
        rows.append([row[a:b] for a, b in itertools.pairwise(ends)])
    return rows
