"""Tells the shapes of objects by harmonic moments of what they cover.

The mean of (x + iy)^p over an object, for p = 2 to 6, tells its outline: 0 of a disc,
each regular polygon has its own order, ovals have the second. The functions are
harmonic, so a blur of the picture leaves their means what they are. What pixels and the
detection's thresholds do to small objects is learned from templates: each shape drawn
as the world draws it, at many radii, places and blurs, and measured as a clip is.
"""

import functools

import numpy as np
from jaxtyping import Complex, Float, Int

from jvdit.data.world.render import signed_distance
from jvdit.data.world.scene import SHAPES
from jvdit.evaluation.oracle.detection import ORDERS, Detections
from jvdit.evaluation.oracle.tracks import PerObject, Tracks, quantile

_RADII = 2.2 * 1.13 ** np.arange(18)  # pixels; larger objects look like the largest
_BLURS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5)  # standard deviations in pixels
_PLACES = 4  # of the centre inside a pixel, along each axis
_FAINTEST = 0.05  # share of a pixel that is covered but isn't detected
# Largest errors of the moments of an outline: of each order, as a share of a template's
# largest moment, and the area in pixels up to which they grow for smaller objects.
_ERRORS = np.array([0.012, 0.012, 0.005, 0.0015, 0.0006])
_ERROR_SHARE = 0.06
_ENOUGH_PIXELS = np.array([30.0, 30.0, 30.0, 60.0, 90.0])
# Of the spread, which noise can only raise, and of the logarithm of the area.
_MORE_SPREAD, _LESS_SPREAD, _OTHER_AREA = 0.02, 0.006, 0.3
_ALIKE = 0.15  # frames are measured in which the area is this near to the typical one


def shapes_of(found: Detections, tracks: Tracks) -> Int[np.ndarray, " n"]:
    """The shape of each captioned object, an index in `SHAPES`; -1: none of them.

    Args:
        found: the detections in the clips.
        tracks: the tracks of the captioned objects.
    """
    clip, color = tracks.clip, tracks.color
    area = tracks.area * found.side**2
    typical = quantile(area, 0.75)
    moments = found.moments
    alike = np.abs(area / typical[:, None] - 1) < _ALIKE

    def middle(value: np.ndarray) -> np.ndarray:
        return quantile(np.where(alike, value[clip, :, color], np.nan), 0.5)

    parts = [np.moveaxis(x, -1, 0) for x in (np.real(moments), np.imag(moments))]
    real, imaginary = (np.stack([middle(x) for x in part], -1) for part in parts)
    spread = middle(found.spread)
    seen = real + 1j * imaginary, spread, typical
    errors = np.stack([_mismatch(i, *seen) for i in range(len(SHAPES))], -1)
    errors = np.nan_to_num(errors, nan=np.inf)
    return np.where(errors.min(-1, initial=np.inf) < 1, errors.argmin(-1), -1)


def _mismatch(
    shape: int,
    moments: Complex[np.ndarray, "n p"],
    spread: PerObject,
    area: PerObject,
) -> PerObject:
    """How far each object is from the nearest template of a shape; below 1 is one."""
    templates, spreads, areas = _templates(shape)
    small = 1 + _ENOUGH_PIXELS[:, None] / area
    # An outline that is slightly stretched changes all orders by its largest moment.
    largest = np.abs(templates).max(-1)
    most = _ERRORS[:, None] + _ERROR_SHARE * largest
    apart = moments.T[:, :, None] - templates.T[:, None]
    apart = (np.real(apart) ** 2 + np.imag(apart) ** 2) / np.square(most)[:, None]
    error = (apart / np.square(small)[..., None]).max(0)
    more = spread[:, None] - spreads
    less = _LESS_SPREAD * small[0, :, None]
    error += 0.5 * np.where(more > 0, more / _MORE_SPREAD, more / less) ** 2
    known = np.minimum(area, areas.max())[:, None]
    other = np.abs(np.log(known) - np.log(areas)) / _OTHER_AREA
    return np.sqrt((error + np.maximum(other - 0.3, 0) ** 2).min(1))


@functools.cache
def _templates(
    shape: int,
) -> tuple[
    Complex[np.ndarray, "m p"], Float[np.ndarray, " m"], Float[np.ndarray, " m"]
]:
    """Moments, spread and area in pixels of a shape at each radius and blur."""
    # The import takes long, which every start of a training would wait for.
    from scipy.ndimage import gaussian_filter

    rows = []
    for radius in _RADII:
        reach = int(np.ceil(1.6 * radius)) + 6
        grid = np.arange(-reach, reach + 1.0)
        places = _PLACES if radius < 8 else 2
        x = grid - (((np.arange(places) + 0.5) / places) - 0.5)[:, None]
        x, y = x[None, :, None, :], x[:, None, :, None]
        cover = np.clip(0.5 - signed_distance(shape, x, y, np.full(1, radius)), 0, 1)
        for blur in _BLURS:
            drawn = gaussian_filter(cover, (0, 0, blur, blur)) if blur else cover
            high = drawn**8
            peak = (high * drawn).sum((2, 3)) / high.sum((2, 3))
            weight = np.where(drawn > _FAINTEST, drawn, 0) / peak[..., None, None]
            area = weight.sum((2, 3))[..., None, None]
            place = grid + 1j * grid[:, None]
            place = place - (weight * place).sum((2, 3), keepdims=True) / area
            place, weight = place / np.sqrt(area), weight / area
            moments = [(weight * place**p).sum((2, 3)).mean() for p in ORDERS]
            spread = (weight * np.abs(place) ** 2).sum((2, 3)).mean()
            rows.append((moments, spread, area.mean()))
    moments, spreads, areas = map(np.array, zip(*rows, strict=True))
    return moments, spreads, areas
