"""Attention patterns: which tokens of its clip a token sees in self-attention.

Tokens of one clip and one time are a frame, and those at one place (y, x) a cell: what
`Tokens` carries tells both, for clips of every size side by side in a row. Frames are
numbered in the order of time. A token of sound belongs to the frame that is nearest in
time, and all sound of a clip is one more cell, so that spatial attention joins both
kinds and temporal attention goes along each. In a clip without pictures every token of
sound is a frame.

Every pattern is an interval of ids, see `Visible`. Windows in space aren't: a token
would see one interval in each line of cells.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jvdit.shapes import Tokens, Visible


class Places(NamedTuple):
    """Where the tokens of each row lie.

    Attributes:
        group: tokens see none of another group: of another clip, or of the other kind
            where `apart` has cut their clip.
        frame: the number of its frame in its clip.
        cell: the number of its cell among those of all clips.
        frames: a number that no frame reaches.
    """

    group: Int[Array, "b n"]
    frame: Int[Array, "b n"]
    cell: Int[Array, "b n"]
    frames: int

    def between(
        self, first: Int[Array, "b n"] | int, last: Int[Array, "b n"]
    ) -> Visible:
        """Tokens see the frames of their group from `first` to `last`."""
        start = self.group * self.frames
        first, last = jnp.maximum(first, 0), jnp.minimum(last, self.frames - 1)
        return Visible(start + self.frame, start + first, start + last)


class Reach(NamedTuple):
    """How far attention reaches in time.

    Attributes:
        chunk: frames of a chunk of "chunk_causal".
        window: frames before and after its own that a token sees in "windowed".
    """

    chunk: int
    window: int


class Pattern(NamedTuple):
    """A row of `PATTERNS`.

    Attributes:
        rule: what tokens at these places see. None: all of their clip.
        folded: the axes of q, k and v where a row is one grid of f frames of s cells
            each, if what sees one another is then a row of its own; "": it isn't.
        sorts: tokens that see one another don't lie side by side in a row; attention
            puts them there first, so that whole blocks are hidden.
    """

    rule: Callable[[Places, Reach], Visible] | None = None
    folded: str = ""
    sorts: bool = False


def _spatial(at: Places, _: Reach) -> Visible:
    return Visible.packed(at.group * at.frames + at.frame)


def _temporal(at: Places, _: Reach) -> Visible:
    return Visible.packed(at.cell)


def _windowed(at: Places, reach: Reach) -> Visible:
    return at.between(at.frame - reach.window, at.frame + reach.window)


def _chunk_causal(at: Places, reach: Reach) -> Visible:
    return at.between(0, (at.frame // reach.chunk + 1) * reach.chunk - 1)


# Factorised attention, arXiv:2103.15691 (section 3.3); causal from chunk to chunk,
# arXiv:2412.07772.
PATTERNS: dict[str, Pattern] = {
    "full": Pattern(),
    "spatial": Pattern(_spatial, "(b f) s q k"),
    "temporal": Pattern(_temporal, "(b s) f q k", sorts=True),
    "windowed": Pattern(_windowed),
    "chunk_causal": Pattern(_chunk_causal),
}


def rules(
    tokens: Tokens, names: Iterable[str], reach: Reach
) -> dict[str, Visible | None]:
    """What self-attention sees by each of these patterns; None: everything.

    Args:
        tokens: of one clip a row, or packed.
        names: of patterns.
        reach: in time.
    """
    chosen = {name: PATTERNS[name].rule for name in names}
    at = places(tokens) if any(chosen.values()) else None
    return {
        name: tokens.sees if rule is None or at is None else rule(at, reach)
        for name, rule in chosen.items()
    }


def share(name: str, frames: int, cells: int, reach: Reach) -> float:
    """The share of all pairs that see each other, in a clip of one grid.

    Args:
        name: of the pattern.
        frames: of the clip.
        cells: of each frame.
        reach: in time.
    """
    pattern = PATTERNS[name]
    if pattern.rule is None:
        return 1.0
    frame = jnp.arange(frames)[None]
    zero = jnp.zeros_like(frame)
    seen = pattern.rule(Places(zero, frame, zero, frames), reach).mask()
    return float(np.mean(seen)) / (cells if pattern.sorts else 1)


def places(tokens: Tokens) -> Places:
    """Finds the frame and the cell of every token."""
    b, n = tokens.latents.shape[:2]
    clip = tokens.segment
    clip = jnp.zeros((b, n), jnp.int32) if clip is None else clip
    t, y, x = jnp.moveaxis(tokens.position, -1, 0)
    sound = jnp.broadcast_to(jnp.arange(n)[None] >= (tokens.kinds or (n,))[0], (b, n))
    clips, times, sounds, order = _sorted(clip, t, sound.astype(jnp.int32))
    if tokens.kinds:
        times = _of_frames(clips, times, sounds == 1)
    begins = _changes(clips)
    number = jnp.cumsum(begins | _changes(times), axis=1, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(begins, number, 0), axis=1)
    frame = _unsorted(number - first, order)
    *keys, order = _sorted(clip, sound.astype(jnp.int32), y, x)
    changes = [_changes(key) for key in keys]
    number = jnp.cumsum(sum(changes[1:], changes[0]), axis=1, dtype=jnp.int32)
    sees = tokens.sees
    group = clip if sees is None else sees.low
    return Places(group, frame, _unsorted(number, order), n)


def _sorted(*keys: Array) -> tuple[Array, ...]:
    """Sorts the tokens of each row by some keys; returns these, and their order."""
    order = jnp.broadcast_to(jnp.arange(keys[0].shape[1])[None], keys[0].shape)
    return tuple(jax.lax.sort((*keys, order), dimension=1, num_keys=len(keys)))


def _unsorted(values: Int[Array, "b n"], order: Int[Array, "b n"]) -> Array:
    return jax.lax.sort((order, values), dimension=1, num_keys=1)[1]


def _changes(key: Array) -> Bool[Array, "b n"]:
    """Where a value differs from the one before; the first doesn't."""
    return jnp.pad(key[:, 1:] != key[:, :-1], ((0, 0), (1, 0)))


def _of_frames(
    clip: Int[Array, "b n"], t: Float[Array, "b n"], sound: Bool[Array, "b n"]
) -> Float[Array, "b n"]:
    """The time of the nearest frame of the clip, or its own if there is none.

    Args:
        clip: of each token, in order.
        t: its time, in order within a clip.
        sound: whether it is of sound, which makes no frame.
    """
    n = t.shape[1]
    index = jnp.arange(n)[None]
    before = jax.lax.cummax(jnp.where(sound, 0, index), axis=1)
    after = jax.lax.cummin(jnp.where(sound, n - 1, index), axis=1, reverse=True)
    found, best = t, jnp.full_like(t, jnp.inf)
    for near in (before, after):
        own, other, time = (
            jnp.take_along_axis(z, near, axis=1) for z in (clip, sound, t)
        )
        far = jnp.where((own == clip) & ~other, jnp.abs(time - t), jnp.inf)
        found, best = jnp.where(far < best, time, found), jnp.minimum(far, best)
    return found
