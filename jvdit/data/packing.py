"""Tokens of several clips to the rows of one batch, and back.

Training packs clips with it, and sampling packs requests.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jvdit.data.items import Item
from jvdit.data.patches import Size, token_grid, unpatchify

_OPEN_ROWS = 512  # rows that best fit chooses from

# What only some batches have of each token.
_EXTRAS = ("givable", "cond", "control")

# A posterior this narrow is a point: sampling it returns its mean.
POINT_LOGVAR = -30.0


def best_fit(
    tokens: Sequence[int],
    text: Sequence[int],
    token_budget: int,
    text_budget: int,
    max_clips: int,
) -> list[list[int]]:
    """Packs items in order, each into the fullest row that takes it; returns rows."""
    smallest = min(tokens, default=0)
    rows: list[list[int]] = []
    text_room: list[int] = []
    room: list[tuple[int, int]] = []  # (token room, row) of the open rows, sorted
    for item, (need, words) in enumerate(zip(tokens, text, strict=True)):
        at = bisect.bisect_left(room, (need, -1))
        while at < len(room) and text_room[room[at][1]] < words:
            at += 1
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = token_budget, len(rows)
            rows.append([])
            text_room.append(text_budget)
        rows[row].append(item)
        left -= need
        text_room[row] -= words
        if left >= smallest and len(rows[row]) < max_clips:
            bisect.insort(room, (left, row))
            if len(room) > _OPEN_ROWS:
                room.pop(0)
    return rows


def pack_rows(
    rows: Sequence[Sequence[Item]], token_budget: int, text_budget: int, max_clips: int
) -> dict[str, np.ndarray]:
    """Puts items side by side in rows of one static shape.

    Args:
        rows: the items of each row, in order.
        token_budget: tokens of a row, n.
        text_budget: text tokens of a row, s.
        max_clips: most items of a row, m.

    Returns:
        `latents`, `logvar` [b n c], `position` [b n 3], `kind`, `segment`, `level`
        [b n], `text_ids` [b s] or `text_embeds` [b s e], `text_segment` [b s], `valid`
        [b m], `clip_id` [b m] (-1: empty place), and `givable` [b n], `cond` [b n u],
        `control` [b n v], `image` [b i z] where items have them. Item i of a row is
        segment i + 1 in its tokens and in its text, and so is the level of its tokens
        that are generated; segment 0 is padding, whose latents are zero. Level 0 are
        padding and what is given.

    Raises:
        ValueError: a row exceeds one of the three bounds, or there is no item.
    """
    items = [item for row in rows for item in row]
    if not items:
        raise ValueError("`rows` holds no item, so the width of a token is unknown.")
    b, n, s, m = len(rows), token_budget, text_budget, max_clips
    for row in rows:
        for name, size, budget in (
            ("token_budget", sum(len(item.latents) for item in row), n),
            ("text_budget", sum(len(item.text) for item in row), s),
            ("max_clips", len(row), m),
        ):
            if size > budget:
                raise ValueError(
                    f"A row needs {size} of `{name}` (={budget}); raise it, or put "
                    f"fewer or smaller clips in it than {[x.clip_id for x in row]}."
                )
    c, text = items[0].latents.shape[1], items[0].text
    name, kind = (
        ("text_ids", np.int32) if text.ndim == 1 else ("text_embeds", np.float32)
    )
    batch: dict[str, np.ndarray] = {
        "latents": np.zeros((b, n, c), np.float32),
        "logvar": np.full((b, n, c), POINT_LOGVAR, np.float32),
        "position": np.zeros((b, n, 3), np.float32),
        "kind": np.zeros((b, n), np.int32),
        "segment": np.zeros((b, n), np.int32),
        "level": np.zeros((b, n), np.int32),
        name: np.zeros((b, s, *text.shape[1:]), kind),
        "text_segment": np.zeros((b, s), np.int32),
        "valid": np.zeros((b, m), np.bool_),
        "clip_id": np.full((b, m), -1, np.int64),
    }
    extras = _blank_extras(items, b, n)
    batch |= extras
    if items[0].image is not None:
        batch["image"] = np.stack([row[0].image for row in rows])
    for r, row in enumerate(rows):
        token = word = 0
        for i, item in enumerate(row):
            tokens = (r, slice(token, token + len(item.latents)))
            words = (r, slice(word, word + len(item.text)))
            token, word = tokens[1].stop, words[1].stop
            batch["valid"][r, i], batch["clip_id"][r, i] = item.valid, item.clip_id
            if not item.valid:
                continue
            batch["segment"][tokens] = batch["text_segment"][words] = i + 1
            batch["level"][tokens] = np.where(item.level, i + 1, 0)
            batch["kind"][tokens] = item.kind
            batch[name][words] = item.text
            for key in ("latents", "logvar", "position", *extras):
                if (value := getattr(item, key)) is not None:
                    batch[key][tokens] = value
    return batch


def _blank_extras(items: Sequence[Item], b: int, n: int) -> dict[str, np.ndarray]:
    """Room for what only some batches have of each token."""
    for key in (*_EXTRAS, "image"):
        if len({getattr(item, key) is None for item in items}) > 1:
            raise ValueError(f"Some items have `{key}` and others have not.")
    given = {key: getattr(items[0], key) for key in _EXTRAS}
    return {
        key: np.zeros((b, n, *value.shape[1:]), value.dtype)
        for key, value in given.items()
        if value is not None
    }


def unpack_rows(
    tokens: Shaped[Any, "b n p"],
    latent_sizes: Sequence[Sequence[Size]],
    patch_size: Size,
) -> list[list[Shaped[np.ndarray, "f h w c"]]]:
    """Takes rows apart into the latents of their items; undoes `pack_rows`.

    `tokens` are such as the `latents` of a batch after denoising, and `latent_sizes`
    those of each item of each row.
    """
    rows = []
    for row, sizes in zip(np.asarray(tokens), latent_sizes, strict=True):
        start, items = 0, []
        for size in sizes:
            count = int(np.prod(token_grid(size, patch_size)))
            items.append(unpatchify(row[start : start + count], size, patch_size))
            start += count
        rows.append(items)
    return rows
