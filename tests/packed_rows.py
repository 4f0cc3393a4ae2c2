"""Rows whose frames and cells are known, and what each pattern shows, naively."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jvdit.data.patches import positions, sound_positions
from jvdit.models.attention.patterns import Reach
from jvdit.shapes import Tokens

REACH = Reach(chunk=2, window=1)


@dataclasses.dataclass
class Row:
    """Tokens of a row, one entry each: what it is of, and where it lies in its clip."""

    clip: np.ndarray
    sound: np.ndarray
    frame: np.ndarray
    cell: np.ndarray
    position: np.ndarray

    def __len__(self):
        return len(self.clip)

    def shows(self, name, cut=False):
        """Whether each token sees each other one; padding sees padding."""
        own = self.clip[:, None] == self.clip[None]
        alike = self.sound[:, None] == self.sound[None]
        now, then = self.frame[:, None], self.frame[None]
        cells = self.cell[:, None] == self.cell[None]
        shown = {
            "full": True,
            "spatial": now == then,
            "temporal": np.where(alike, self.sound[:, None] | cells, False),
            "windowed": np.abs(now - then) <= REACH.window,
            "chunk_causal": then // REACH.chunk <= now // REACH.chunk,
        }[name]
        return own & shown & (alike | (not cut))


def clip_of(number, size, fps, sounds):
    """Tokens of the picture and of the sound of one clip."""
    f, h, w = size
    frames, cells = np.indices((f, h * w)).reshape(2, -1)
    places = positions(size, (1, 1, 1), fps, 4)
    heard = sound_positions(sounds, 10.0, None, 4)
    # The nearest in time; of two, the earlier.
    near = np.abs(heard[:, None, 0] - places[None, :: h * w, 0]).argmin(axis=1)
    same = np.full(f * h * w, number), np.full(sounds, number)
    picture = Row(same[0], np.zeros(len(frames), bool), frames, cells, places)
    zero = np.zeros(sounds, int)
    return picture, Row(same[1], np.ones(sounds, bool), near.astype(int), zero, heard)


def padding(count):
    zero = np.zeros(count, int)
    return Row(zero, zero > 0, zero, zero, np.zeros((count, 3), np.float32))


def row_of(clips, budget, sound_budget=0):
    """Pictures, padding, sounds and padding, in the order of a batch's row."""
    parts = [clip_of(i + 1, *clip) for i, clip in enumerate(clips)]
    joined = []
    for kind, room in enumerate((budget, sound_budget)):
        own = [part[kind] for part in parts]
        joined += [*own, padding(room - sum(map(len, own)))]
    fields = [x.name for x in dataclasses.fields(Row)]
    return Row(*(np.concatenate([getattr(x, n) for x in joined]) for n in fields))


def tokens_of(rows, kinds=(), channels=4, seed=0):
    """The tokens of a batch, with noise for latents."""
    clip = jnp.asarray(np.stack([row.clip for row in rows]), jnp.int32)
    shape = (*clip.shape, channels)
    latents = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    position = jnp.asarray(np.stack([row.position for row in rows]), jnp.float32)
    levels = int(clip.max()) + 1  # of each kind
    sound = np.arange(clip.shape[1]) >= (kinds or (clip.shape[1],))[0]
    level = clip + jnp.asarray(levels * sound)[None]
    return Tokens(jnp.asarray(latents), position, clip, level, kinds=kinds)


# Frames, height and width; frames a second; tokens of sound. The same grid twice, other
# grids, one frame alone, and clips of which the second has no sound.
ROWS = [
    [
        ((3, 2, 2), 4.0, 3),
        ((3, 2, 2), 8.0, 0),
        ((5, 1, 3), 16.0, 9),
        ((1, 2, 1), 8.0, 1),
    ],
    [((5, 2, 3), 8.0, 11)],
]


def packed(sounds=True):
    """Two rows of pictures, and of sounds, whose lengths 8 divides."""
    sizes = (48, 16) if sounds else (48, 0)
    if not sounds:
        plain = [[(size, fps, 0) for size, fps, _ in row] for row in ROWS]
        return [row_of(row, *sizes) for row in plain], ()
    return [row_of(row, *sizes) for row in ROWS], sizes
