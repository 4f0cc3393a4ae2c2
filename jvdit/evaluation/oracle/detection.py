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
_NEAREST = np.abs((np.arange(360)[:, None] - HUES + 180) % 360 - 180).argmin(1)

Video = UInt8[np.ndarray, "b T H W 3"]


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


def detect(video: Video) -> Detections:
    """Finds the objects of each color in each frame.

    Args:
        video: RGB in [0, 255].
    """
    objects = np.empty(video.shape[:-1], bool)
    parts = [_measure(*pair) for pair in zip(video, objects, strict=True)]
    named = {k: np.array([part[k] for part in parts]) for k in parts[0]}
    return Detections(objects=objects, **named)


def _measure(
    clip: UInt8[np.ndarray, "T H W 3"], objects: Bool[np.ndarray, "T H W"]
) -> dict[str, np.ndarray]:
    """Measures the objects of a clip, as in `Detections`, and sets their pixels."""
    frames, height, width = objects.shape
    least = _LEAST_AREA * min(height, width) ** 2
    key, chosen, chroma = _colored_pixels(clip, objects)
    first = np.flatnonzero(np.diff(key, prepend=-1))  # of each color in each frame
    size = np.diff(first, append=len(key))

    def total(weights: np.ndarray) -> np.ndarray:
        return np.add.reduceat(weights, first) if len(first) else weights

    def each(of_group: np.ndarray) -> np.ndarray:
        return np.repeat(of_group, size)

    # The chroma of fully covered pixels: a mean that all but takes the largest.
    high = np.square(np.square(np.square(chroma / 255)))
    weight = chroma * each(total(high) / np.maximum(total(high * chroma), 1e-30))
    row = chosen // width  # of all frames; a remainder would take longer
    x, y = chosen - row * width, row - row // height * height
    place = x + 0.5 + 1j * (y + 0.5)
    area = total(weight)
    centre = total(weight * place) / area
    place = (place - each(centre)) * each(1 / np.sqrt(area))
    squared = place.real**2 + place.imag**2
    spread = total(weight * squared) / area
    near = weight * (squared < _REACH)
    moments, power = np.empty((len(first), len(ORDERS)), complex), near * place
    for column in moments.T:
        power *= place
        column[:] = total(power) / area
    pieces = (area > least).astype(int)
    split = (area > least) & (spread > _SURELY_ONE)
    if split.any():
        some = each(split)
        pixels = (x[some] for x in (chosen, weight, key))
        pieces[split] = _pieces(*pixels, objects.shape, least)
    # Two objects of one color aren't compact together, but are present.
    present = (area > least) & (spread < _MOST_SPREAD) | (pieces > 1)
    measured = {
        "centre": np.stack([centre.real, centre.imag], -1),
        "area": area,
        "present": present,
        "pieces": pieces,
        "moments": moments,
        "spread": total(near * squared) / area,
    }
    for name, values in measured.items():
        every = np.zeros((frames * len(COLORS), *values.shape[1:]), values.dtype)
        every[key[first]] = values
        measured[name] = every.reshape(frames, len(COLORS), *values.shape[1:])
    return measured


def _colored_pixels(
    clip: UInt8[np.ndarray, "T H W 3"], objects: Bool[np.ndarray, "T H W"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the pixels of objects, and sets them in `objects`.

    Returns:
        Of each pixel its color in its frame (frame times the number of colors, plus
        color), in order of which they come, its flat index and its chroma.
    """
    high, chroma = _high_and_chroma(clip)
    mask = 10 * chroma.astype(np.uint16) > np.uint16(3) * high
    mask &= chroma > _LEAST_CHROMA
    # A pixel on its own, or with a few others, is noise.
    mask &= _around(mask) >= 4
    grey = ~mask
    noise = (chroma * grey).sum() / max(np.count_nonzero(grey), 1)
    faintest = np.uint8(min(max(_EDGE_CHROMA, 2.5 * noise), 255))
    edge = (chroma > faintest) & (_around(mask) > 0)
    np.logical_or(mask, edge, out=objects)
    chosen = np.flatnonzero(objects)
    value, high = (x.reshape(-1)[chosen].astype(np.float32) for x in (chroma, high))
    rgb = clip.reshape(-1, 3).take(chosen, 0)
    red, green, blue = np.ascontiguousarray(rgb.T, np.float32)
    # Hue in sixths of the circle, by the largest channel (HSV).
    of_red, of_green = red == high, green == high
    apart = np.where(of_red, green - blue, np.where(of_green, blue - red, red - green))
    sixths = np.where(of_red, 0, np.where(of_green, 2, 4)).astype(np.float32)
    sixths += apart / value
    color = _NEAREST[np.rint(60 * sixths).astype(int) % 360]
    key = chosen // objects[0].size * len(COLORS) + color
    # Short integers are sorted much faster.
    short = key.astype(np.min_scalar_type(key.max(initial=0)))
    order = np.argsort(short, kind="stable")
    return key[order], chosen[order], value[order].astype(float)


def _high_and_chroma(
    clip: UInt8[np.ndarray, "T H W 3"],
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """The largest channel of each pixel, and by how much it exceeds the smallest."""
    # All runs of three bytes are compared, since strided ones take much longer.
    flat = clip.reshape(-1)
    runs = flat[:-2], flat[1:-1], flat[2:]
    high = np.maximum(np.maximum(runs[0], runs[1]), runs[2])
    low = np.minimum(np.minimum(runs[0], runs[1]), runs[2])
    high, low = high[::3].copy(), low[::3]
    return high.reshape(clip.shape[:-1]), (high - low).reshape(clip.shape[:-1])


def _around(mask: Bool[np.ndarray, "T H W"]) -> UInt8[np.ndarray, "T H W"]:
    """How many of each pixel and its eight neighbours are set."""
    one = mask.view(np.uint8)
    three = one.copy()
    three[:, 1:] += one[:, :-1]
    three[:, :-1] += one[:, 1:]
    nine = three.copy()
    nine[..., 1:] += three[..., :-1]
    nine[..., :-1] += three[..., 1:]
    return nine


def _pieces(chosen, weight, key, shape, least) -> np.ndarray:
    """How many connected pieces, large enough, each color has in each frame."""
    height, width = shape[1:]
    place = np.full(int(np.prod(shape)) + width + 2, -1, np.int32)
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
    touching = np.ones(len(first), bool), (first, second)
    links = coo_array(touching, shape=(len(chosen),) * 2)
    count, piece = connected_components(links, directed=False)
    large = np.bincount(piece, weight, count) > least
    group = np.zeros(count, np.int64)
    group[piece] = np.unique(key, return_inverse=True)[1]
    return np.bincount(group[large], minlength=len(np.unique(key)))
