"""Finds the objects of the procedural world in any clip, generated ones included.

Everything but the objects is grey, so the chroma of a pixel (its largest minus its
smallest channel) is how much of it an object covers, times the object's own chroma;
its hue tells which of the world's colors it is, whatever the light. Thresholds are for
pixel values in [0, 255]; lengths are in short sides of the frame, as in `world.scene`.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Complex, Float, Int, UInt8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jvdit.data.world.scene import COLORS, HUES

_LEAST_CHROMA = 26  # of an object's pixel, which also needs 0.3 of its largest channel
_EDGE_CHROMA = 10  # of a pixel beside those, which the object covers in part
_LEAST_AREA = 0.005  # least area of an object, in squared short sides
ORDERS = (2, 3, 4, 5, 6)  # of the moments that tell an outline
# Mean squared distance from the centre over area: 0.16 of a disc, 0.23 of a cross.
_MOST_SPREAD, _SURELY_ONE = 0.40, 0.24
_REACH = 1.0  # of an object from its centre, squared, over area; a triangle's is 0.77
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
        moments: harmonic moments of each order p in `ORDERS`: the mean of (x + iy)^p
            over the object, centred, in units of the square root of its area.
        spread: mean squared distance from the centre, over the area.
        objects: which pixels belong to an object.
    """

    centre: Float[np.ndarray, "b T k 2"]
    area: Float[np.ndarray, "b T k"]
    present: Bool[np.ndarray, "b T k"]
    pieces: Int[np.ndarray, "b T k"]
    moments: Complex[np.ndarray, "b T k p"]
    spread: Float[np.ndarray, "b T k"]
    objects: Bool[np.ndarray, "b T H W"]

    @property
    def side(self) -> int:
        """Short side of the frame in pixels."""
        return min(self.objects.shape[2:])


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
    x, y = chosen % width + 0.5, chosen // width % height + 0.5
    area = total(weight)
    safe = np.maximum(area, 1e-9)
    centre = np.stack([total(weight * x), total(weight * y)], -1) / safe[:, None]
    place = (x - centre[key, 0] + 1j * (y - centre[key, 1])) / np.sqrt(safe)[key]
    squared = place.real**2 + place.imag**2
    spread = total(weight * squared) / safe
    near = weight * (squared < _REACH)
    moments = _moments(place, near, key, groups) / safe[:, None]
    pieces = (area > least).astype(int)
    split = (area > least) & (spread > _SURELY_ONE)
    some = np.flatnonzero(split[key])
    found = _pieces(chosen[some], weight[some], key[some], groups, video.shape, least)
    pieces = np.where(split, found, pieces)
    objects = np.zeros(video.shape[:-1], bool)
    objects.reshape(-1)[chosen] = True
    shape = (clips, frames, len(COLORS))
    present = (area > least) & (spread < _MOST_SPREAD)
    return Detections(
        centre=centre.reshape(*shape, 2),
        area=area.reshape(shape),
        # Two objects of one color aren't compact together, but are present.
        present=(present | (pieces > 1)).reshape(shape),
        pieces=pieces.reshape(shape),
        moments=moments.reshape(*shape, len(ORDERS)),
        spread=(total(near * squared) / safe).reshape(shape),
        objects=objects,
    )


def _moments(place, weight, key, groups) -> np.ndarray:
    """The sums of the weighted powers of the places, for each order."""
    power, sums = weight * place, np.empty((groups, len(ORDERS)), complex)
    for i in range(len(ORDERS)):
        power = power * place
        sums[:, i].real = np.bincount(key, power.real, groups)
        sums[:, i].imag = np.bincount(key, power.imag, groups)
    return sums


def _colored_pixels(video: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The flat indices, the chroma and the color of the pixels of objects."""
    red, green, blue = (video[..., i] for i in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    mask = (chroma > _LEAST_CHROMA) & (
        10 * chroma.astype(np.uint16) > np.uint16(3) * high
    )
    # A pixel on its own, or with a few others, is noise.
    mask &= _around(mask) >= 4
    noise = chroma.mean((1, 2, 3), where=~mask)[:, None, None, None]
    edge = (chroma > np.maximum(_EDGE_CHROMA, 2.5 * noise)) & (_around(mask) > 0)
    chosen = np.flatnonzero(mask | edge)
    value = chroma.reshape(-1)[chosen].astype(np.float32)
    rgb = video.reshape(-1, 3)[chosen]
    red, green, blue = rgb.astype(np.float32).T
    # Hue in sixths of the circle, by the largest channel (HSV).
    sixths = np.choose(
        rgb.argmax(-1),
        [(green - blue) / value, (blue - red) / value + 2, (red - green) / value + 4],
    )
    return chosen, value, _NEAREST[np.rint(60 * sixths).astype(int) % 360]


def _around(mask: Bool[np.ndarray, "b T H W"]) -> UInt8[np.ndarray, "b T H W"]:
    """How many of each pixel and its eight neighbours are set."""
    rows = np.pad(mask.view(np.uint8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def _peak(chroma: np.ndarray, key: np.ndarray, groups: int) -> np.ndarray:
    """The chroma of fully covered pixels: a mean that all but takes the largest."""
    high = (chroma / 255) ** 8
    total = np.bincount(key, high, groups)
    return np.bincount(key, high * chroma, groups) / np.maximum(total, 1e-30)


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
