"""What a clip is, a clip that cannot be had, and a source of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jvdit.data.media.media_error import MediaError

Clip = dict[str, Any]
Ids = Sequence[int | np.integer] | np.ndarray
SIZE = ("frames", "height", "width")
_TYPES = dict.fromkeys(SIZE, np.int32)
_TYPES |= {"fps": np.float64, "has_audio": np.bool_, "text_length": np.int32}
_TYPES |= {"sounds": np.int32, "given": np.int32}


@dataclass(frozen=True)
class BadClip:
    """What a source returns in place of a clip that it could not read.

    Attributes:
        reason: why, in a line.
    """

    reason: str


@runtime_checkable
class Source(Protocol):
    """A set of clips that can be read in any order.

    Attributes:
        index: one entry a clip: `frames`, `height` and `width` (pixels, or latents for
            a source of latents), `fps` (pixel frames per second), `has_audio`,
            `text_length` (text tokens; 0 where it is unknown), `sounds` (latents of the
            sound; 0 in a source of pixels), and `given` (latents beside those of the
            clip; 0 but in a `GivenSource`).
        fingerprint: equal for sources that return equal clips.
    """

    index: dict[str, np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        """Returns the number of clips."""
        ...

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips in the order asked for.

        A clip of pixels has `video` uint8 [T H W 3], `fps`, `caption`, `audio` float32
        [a channels] in [-1, 1] or None, and `audio_rate`; and, if it was asked for and
        there is one, a `guide` uint8 [T H W 3], a second video of what is seen, and a
        `camera` float32 [T 16], see `jvdit.data.cameras`. A clip of latents has `mean`
        [f h w c], `fps`, `caption`, and may have `logvar` [f h w c], `text_embeds`
        [s e], `sound_mean` and `sound_logvar` [n c], and `view` [f h w c], see
        `LatentSource`.
        """
        ...


class Indexed:
    """A source that knows its index, and reads one clip at a time by `_read_one`."""

    index: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.index["frames"])

    def read(self, ids: Ids) -> list[Clip | BadClip]:
        """Returns clips in the order asked for; see `Source.read`."""
        clips: list[Clip | BadClip] = []
        for i in ids:
            try:
                clips.append(self._read_one(int(i)))
            except MediaError as error:
                clips.append(BadClip(str(error)))
            except Exception as error:  # damaged records and files raise anything
                clips.append(BadClip(f"{type(error).__name__}: {error}"))
        return clips

    def _read_one(self, i: int) -> Clip | BadClip:
        raise LookupError(i)


def make_index(count: int, **columns: Any) -> dict[str, np.ndarray]:
    """Returns the index of `count` clips; every column may be one value for all."""
    columns = {"has_audio": False, "text_length": 0, "sounds": 0, "given": 0} | columns
    if columns.keys() != _TYPES.keys():
        raise ValueError(
            f"An index has the columns {sorted(_TYPES)}, and these differ: "
            f"{sorted(columns.keys() ^ _TYPES.keys())}."
        )
    if count < 1:
        raise ValueError(f"A source must hold clips, and this one holds {count}.")
    return {
        name: np.broadcast_to(np.asarray(columns[name], dtype), (count,)).copy()
        for name, dtype in _TYPES.items()
    }
