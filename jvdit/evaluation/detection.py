"""Finds the objects of the procedural world in any clip, generated ones included.

Everything but the objects is grey, so the chroma of a pixel (its largest minus its
smallest channel) is how much of it an object covers, times the object's own chroma;
its hue tells which of the world's colors it is, whatever the light. Thresholds are for
pixel values in [0, 255]; lengths are in short sides of the frame, as in `world.scene`.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jvdit.data.world.scene import COLORS, HUES

_LEAST_CHROMA = 26  # of an object's pixel, which also needs 0.3 of its largest channel
_LEAST_AREA = 0.005  # least area of an object, in squared short sides
# Mean squared distance from the centre over area: 0.16 of a disc, 0.23 of a cross.
_MOST_SPREAD, _SURELY_ONE = 0.40, 0.24
# Index of the nearest color at each degree of hue.
_NEAREST = np.abs((np.arange(360)[:, None] - np.array(HUES) + 180) % 360 - 180).argmin(
    1
)


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects of each color k in each frame.

    Attributes:
        centre: centroid (x, y), in pixels from the top left corner.
        area: covered area in pixels, partly covered ones counted in part.
        present: whether the color forms a compact object, or several.
        pieces: number of objects of the color that don't touch one another.
        coverage: share of each pixel that an object covers, in [0, 1].
        color: color of each pixel, index in `COLORS`; -1 where there is no object.
    """

    centre: Float[np.ndarray, "b T k 2"]
    area: Float[np.ndarray, "b T k"]
    present: Bool[np.ndarray, "b T k"]
    pieces: Int[np.ndarray, "b T k"]
    coverage: Float[np.ndarray, "b T H W"]
    color: Int[np.ndarray, "b T H W"]

    @property
    def side(self) -> int:
        """Short side of the frame in pixels."""
        return min(self.coverage.shape[2:])


def detect(video: UInt8[np.ndarray, "b T H W 3"]) -> Detections:
    """Finds the objects of each color in each frame.

    Args:
        video: RGB in [0, 255].
    """
    clips, frames, height, width, _ = video.shape
    least = _LEAST_AREA * min(height, width) ** 2
    chosen, chroma, color = _colored_pixels(video)
    key = chosen // (height * width) * len(COLORS) + color
    groups = clips * frames * len(COLORS)

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(key, weights, groups)

    weight = chroma / _peak(chroma, key, groups)[key]
    weight = np.minimum(weight, 1.0)
    x, y = chosen % width + 0.5, chosen // width % height + 0.5
    area = total(weight)
    safe = np.maximum(area, 1e-9)
    centre = np.stack([total(weight * x), total(weight * y)], -1) / safe[:, None]
    offset = (x - centre[key, 0]) ** 2 + (y - centre[key, 1]) ** 2
    spread = total(weight * offset) / safe**2
    pieces = (area > least).astype(int)
    split = (area > least) & (spread > _SURELY_ONE)
    some = np.flatnonzero(split[key])
    found = _pieces(chosen[some], weight[some], key[some], groups, video.shape, least)
    pieces = np.where(split, found, pieces)
    coverage = np.zeros(video.shape[:-1], np.float32)
    coverage.reshape(-1)[chosen] = weight
    colors = np.full(video.shape[:-1], -1, np.int8)
    colors.reshape(-1)[chosen] = color
    shape = (clips, frames, len(COLORS))
    present = (area > least) & (spread < _MOST_SPREAD)
    return Detections(
        centre=centre.reshape(*shape, 2),
        area=area.reshape(shape),
        # Two objects of one color aren't compact together, but are present.
        present=(present | (pieces > 1)).reshape(shape),
        pieces=pieces.reshape(shape),
        coverage=coverage,
        color=colors,
    )


def _colored_pixels(video: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The flat indices, the chroma and the color of the pixels of objects."""
    red, green, blue = (video[..., i] for i in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    mask = (chroma > _LEAST_CHROMA) & (
        10 * chroma.astype(np.uint16) > np.uint16(3) * high
    )
    # A pixel on its own, or with a few others, is noise.
    rows = np.pad(mask.view(np.uint8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    chosen = np.flatnonzero(mask & (around >= 4))
    value = chroma.reshape(-1)[chosen].astype(np.float32)
    rgb = video.reshape(-1, 3)[chosen]
    red, green, blue = rgb.astype(np.float32).T
    # Hue in sixths of the circle, by the largest channel (HSV).
    sixths = np.choose(
        rgb.argmax(-1),
        [(green - blue) / value, (blue - red) / value + 2, (red - green) / value + 4],
    )
    return chosen, value, _NEAREST[np.rint(60 * sixths).astype(int) % 360]


def _peak(chroma: np.ndarray, key: np.ndarray, groups: int) -> np.ndarray:
    """The chroma of fully covered pixels: the mean of those above the mean."""

    def mean(kept: np.ndarray) -> np.ndarray:
        count = np.bincount(key[kept], minlength=groups)
        return np.bincount(key[kept], chroma[kept], groups) / np.maximum(count, 1)

    upper = chroma >= mean(np.ones(len(key), bool))[key]
    return np.maximum(mean(upper), 1.0)


def _pieces(chosen, weight, key, groups, shape, least) -> np.ndarray:
    """How many connected pieces, large enough, each color has in each frame."""
    height, width = shape[2:4]
    place = np.full(int(np.prod(shape[:-1])) + width + 2, -1, np.int32)
    place[chosen] = np.arange(len(chosen))
    x, y = chosen % width, chosen // width % height
    ends = []
    for right, down in ((1, 0), (-1, 1), (0, 1), (1, 1)):
        inside = (x + right >= 0) & (x + right < width) & (y + down < height)
        first = np.flatnonzero(inside)
        second = place[chosen[first] + down * width + right]
        same = (second >= 0) & (key[first] == key[second])
        ends.append(np.stack([first[same], second[same]]))
    first, second = np.concatenate(ends, 1)
    links = coo_array(
        (np.ones(len(first), bool), (first, second)), shape=(len(chosen),) * 2
    )
    count, piece = connected_components(links, directed=False)
    large = np.bincount(piece, weight, count) > least
    group = np.zeros(count, np.int64)
    group[piece] = key
    return np.bincount(group[large], minlength=groups)
