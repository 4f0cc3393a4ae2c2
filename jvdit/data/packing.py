"""Latents to tokens, and tokens of several clips to the rows of one batch.

Training packs clips with it, and sampling packs requests: what is generated has the
layout of what was learned. Everything here has an inverse.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped

# Patch sizes and latent grids are (frames, height, width).
Size = tuple[int, int, int]

# Patches of pt x ph x pw latents, as einops has it.
_LATENTS, _TOKENS = "(f pt) (h ph) (w pw) c", "(f h w) (pt ph pw c)"
_OPEN_ROWS = 512  # rows that best fit chooses from

# What only some batches have of each token.
_EXTRAS = ("clean", "cond", "control")

# A posterior this narrow is a point: sampling it returns its mean.
POINT_LOGVAR = -30.0


def token_grid(latent_size: Size, patch_size: Size) -> Size:
    """Returns how many tokens a latent grid gives along each axis.

    Raises:
        ValueError: a side is no positive multiple of its patch.
    """
    for name, size, patch in zip(
        ("frames", "height", "width"), latent_size, patch_size, strict=True
    ):
        if size < 1 or size % patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"Latent {name} (={size}) must be a positive multiple of the patch "
                f"(={patch}); try {near}."
            )
    f, h, w = (s // p for s, p in zip(latent_size, patch_size, strict=True))
    return f, h, w


def patchify(
    latents: Shaped[np.ndarray, "f h w c"], patch_size: Size
) -> Shaped[np.ndarray, "n p"]:
    """Cuts the latents of one clip into patches; a patch is one token.

    Tokens are in the order of (frame, height, width), the last fastest. The channels of
    a token are in the order of (frame, height, width, channel) within the patch, as the
    kernel of a channels-last strided convolution has them.
    """
    token_grid(latents.shape[:3], patch_size)
    patch = dict(zip(("pt", "ph", "pw"), patch_size, strict=True))
    return rearrange(latents, f"{_LATENTS} -> {_TOKENS}", **patch)


def unpatchify(
    tokens: Shaped[np.ndarray, "n p"], latent_size: Size, patch_size: Size
) -> Shaped[np.ndarray, "f h w c"]:
    """Puts the patches of one clip together again; undoes `patchify`."""
    f, h, w = token_grid(latent_size, patch_size)
    if tokens.shape[0] != f * h * w:
        raise ValueError(
            f"Latents of size {latent_size} in patches of {patch_size} are {f * h * w} "
            f"tokens, and {tokens.shape[0]} were given."
        )
    patch = dict(zip(("pt", "ph", "pw"), patch_size, strict=True))
    return rearrange(tokens, f"{_TOKENS} -> {_LATENTS}", f=f, h=h, **patch)


def latent_times(
    frames: int, fps: float, temporal_compression: int
) -> Float[np.ndarray, "f"]:
    """Returns the time of each latent frame of a causal VAE, in seconds.

    Latent frame 0 is pixel frame 0 alone, and latent frame i > 0 covers the pixel
    frames from `temporal_compression * (i - 1) + 1` to `temporal_compression * i`; its
    time is the middle of those.
    """
    if not fps > 0:
        raise ValueError(f"`fps` (={fps}) must be positive.")
    i = np.arange(frames)
    middle = temporal_compression * (i - 1) + (temporal_compression + 1) / 2
    return np.where(i == 0, 0.0, middle) / fps


@functools.lru_cache(maxsize=1024)
def positions(
    latent_size: Size, patch_size: Size, fps: float | None, temporal_compression: int
) -> Float[np.ndarray, "n 3"]:
    """Returns the (t, y, x) coordinates of the tokens of one clip.

    Args:
        latent_size: latent frames, height and width.
        patch_size: latent frames, height and width of a patch.
        fps: pixel frames per second of the clip. None: t counts tokens like y and x, as
            imported models do.
        temporal_compression: pixel frames that a latent frame after the first covers.

    Returns:
        t in seconds, the mean over the latent frames of the patch, so that clips of
        different frame rates share one clock; y and x in patches, so that neighbouring
        tokens differ by 1. float32, in the order of `patchify`; not to be written to,
        for clips of a size share it.
    """
    f, h, w = token_grid(latent_size, patch_size)
    if fps is None:
        t = np.arange(f, dtype=np.float64)
    else:
        times = latent_times(latent_size[0], fps, temporal_compression)
        t = rearrange(times, "(f pt) -> f pt", f=f).mean(axis=1)
    grid = np.meshgrid(t, np.arange(h), np.arange(w), indexing="ij")
    position = rearrange(np.stack(grid), "a f h w -> (f h w) a").astype(np.float32)
    position.flags.writeable = False
    return position


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


@dataclass(frozen=True)
class Item:
    """One clip (or one request) in tokens, ready to be put in a row.

    Attributes:
        latents: its tokens.
        position: (t, y, x) of each.
        logvar: log variance of each, where `latents` is the mean of a posterior. None:
            `latents` is exact.
        text_ids: ids of its caption. Exactly one of this and `text_embeds` is given.
        text_embeds: states of a text encoder for its caption.
        clean: which tokens are given, not generated. None: none is.
        cond: channels beside those of the tokens, see `Tokens`. Like `clean`, `control`
            and `image`, either all items of a batch have it or none has.
        control: control signal under each token.
        image: states of an image encoder; such an item has a row to itself.
        clip_id: which clip it is, at least 0.
        valid: False for a clip that could not be read: it keeps its place and its id,
            but its tokens are padding.
    """

    latents: Float[np.ndarray, "n c"]
    position: Float[np.ndarray, "n 3"]
    logvar: Float[np.ndarray, "n c"] | None = None
    text_ids: Int[np.ndarray, "s"] | None = None
    text_embeds: Float[np.ndarray, "s e"] | None = None
    clean: Bool[np.ndarray, "n"] | None = None
    cond: Float[np.ndarray, "n u"] | None = None
    control: Float[np.ndarray, "n v"] | None = None
    image: Float[np.ndarray, "i z"] | None = None
    clip_id: int = 0
    valid: bool = True

    def __post_init__(self):
        if (self.text_ids is None) == (self.text_embeds is None):
            raise ValueError("Give exactly one of `text_ids` and `text_embeds`.")
        if len(self.latents) != len(self.position):
            raise ValueError(
                f"Clip {self.clip_id} has {len(self.latents)} tokens and "
                f"{len(self.position)} positions."
            )

    @property
    def text(self) -> Shaped[np.ndarray, "s ..."]:
        """Its caption, in whichever form it has."""
        text = self.text_embeds if self.text_ids is None else self.text_ids
        assert text is not None
        return text


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
        `latents`, `logvar` [b n c], `position` [b n 3], `segment` [b n], `text_ids`
        [b s] or `text_embeds` [b s e], `text_segment` [b s], `valid` [b m], `clip_id`
        [b m] (-1: empty place), and `clean` [b n], `cond` [b n u], `control` [b n v],
        `image` [b i z] where items have them. Item i of a row is segment i + 1 in its
        tokens and in its text; segment 0 is padding, whose latents are zero.

    Raises:
        ValueError: a row exceeds one of the three bounds, or there is no item.
    """
    items = [item for row in rows for item in row]
    if not items:
        raise ValueError("`rows` holds no item, so the width of a token is unknown.")
    for row in rows:
        _check_row(row, token_budget, text_budget, max_clips)
    b, n, s, m = len(rows), token_budget, text_budget, max_clips
    c, text = items[0].latents.shape[1], items[0].text
    name, kind = (
        ("text_ids", np.int32) if text.ndim == 1 else ("text_embeds", np.float32)
    )
    batch: dict[str, np.ndarray] = {
        "latents": np.zeros((b, n, c), np.float32),
        "logvar": np.full((b, n, c), POINT_LOGVAR, np.float32),
        "position": np.zeros((b, n, 3), np.float32),
        "segment": np.zeros((b, n), np.int32),
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


def _check_row(
    row: Sequence[Item], token_budget: int, text_budget: int, max_clips: int
) -> None:
    if len(row) > max_clips:
        raise ValueError(
            f"A row of {len(row)} clips exceeds `max_clips` (={max_clips})."
        )
    for name, budget, sizes in (
        ("token_budget", token_budget, [len(item.latents) for item in row]),
        ("text_budget", text_budget, [len(item.text) for item in row]),
    ):
        for item, size in zip(row, sizes, strict=True):
            if size > budget:
                raise ValueError(
                    f"Clip {item.clip_id} needs {size} of `{name}` (={budget}); raise "
                    "the budget or use a smaller clip."
                )
        if sum(sizes) > budget:
            raise ValueError(
                f"A row needs {sum(sizes)} of `{name}` (={budget}): {sizes}; put fewer "
                "clips in it."
            )


def unpack_rows(
    tokens: Shaped[Any, "b n p"],
    latent_sizes: Sequence[Sequence[Size]],
    patch_size: Size,
) -> list[list[Shaped[np.ndarray, "f h w c"]]]:
    """Takes rows apart into the latents of their items; undoes `pack_rows`.

    `tokens` are such as the `latents` of a batch after denoising, and `latent_sizes`
    those of each item of each row.
    """
    tokens = np.asarray(tokens)
    if len(tokens) != len(latent_sizes):
        raise ValueError(
            f"`tokens` has {len(tokens)} rows and `latent_sizes` {len(latent_sizes)}."
        )
    rows = []
    for row, sizes in zip(tokens, latent_sizes, strict=True):
        start, items = 0, []
        for size in sizes:
            count = int(np.prod(token_grid(size, patch_size)))
            items.append(unpatchify(row[start : start + count], size, patch_size))
            start += count
        rows.append(items)
    return rows
