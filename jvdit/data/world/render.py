"""Pixels of the procedural world.

Everything but the objects is grey, so an object's chroma is its coverage times that
of its color, whatever the light does. Edges are antialiased: backgrounds by exact
pixel coverage, objects by their signed distance.

Units and dimensions are those of `jvdit.data.world.scene`; in addition T H W frames,
height and width in pixels.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt16
from numpy.lib.stride_tricks import as_strided

from jvdit.data.world.mechanics import Motion
from jvdit.data.world.scene import (
    CROSS_THICKNESS,
    HALF_EXTENTS,
    HUES,
    MAX_OBJECTS,
    SHAPES,
    TEXTURES,
    Scenes,
)

Video = UInt8[np.ndarray, "b T H W 3"]


def _palette() -> np.ndarray:
    """Pixel values of `COLORS`: HSV with the hues of `HUES` and the value 235."""
    sector = (np.array([5, 3, 1]) + np.array(HUES)[:, None] / 60) % 6
    tint = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return 235 * (1 - 0.95 * tint)


PALETTE = _palette()  # [colors, rgb] in [0, 255], under full light
# Red, yellow, green, blue and purple, by shape.
SHAPE_PALETTE = PALETTE[[0, 2, 3, 5, 6]]
TONE_LEVELS = np.array([16.0, 96.0, 176.0])  # pixel values of `TONES`
WALL_LEVELS = np.array([64.0, 144.0, 112.0])  # around the arena, by tone
BAR_LEVELS = np.array([132.0, 132.0, 72.0])  # by tone
TEXTURE_STEP = 14.0  # by which every other stripe is lighter
_STRIPE = 0.125
# Objects of a shape whose radii round up to the same multiple are of a kind.
_ROUNDING_STEP = 0.05
# An edge half a pixel out is that of a shape whose radius is larger by so many pixels:
# most for the triangle, 0.5 over its inradius.
_SOFT_EDGE = 0.65


def render(
    scenes: Scenes,
    motion: Motion,
    frames: int,
    height: int,
    width: int,
    fps: float,
    distance: Callable[..., np.ndarray] | None = None,
    half_extents: Float[np.ndarray, "shapes 2 2"] = HALF_EXTENTS,
) -> Video:
    """Draws each scene at times 0, 1 / fps, ... as RGB in [0, 255].

    Args:
        scenes: what there is to see.
        motion: how it moves.
        frames: of each clip.
        height: in pixels, like `width`, and of the aspect that the scenes are sampled
            for.
        width: in pixels.
        fps: frames per second.
        distance: in the place of `signed_distance`, to draw other outlines.
        half_extents: how far those reach.
    """
    distance = distance or signed_distance
    times = np.arange(frames) / fps
    video = np.empty((len(scenes.ids), frames, height, width, 3), np.uint8)
    gain = scenes.light_gain(times)
    offset = scenes.pan_offset(times)
    scale = min(height, width)
    _draw_backgrounds(video, scenes, offset, gain, scale)
    paint = PALETTE[scenes.color][:, None] * gain[..., None, None]
    _draw_all(video, scenes, motion, times, paint, distance, half_extents)
    level = BAR_LEVELS[scenes.tone][:, None] * gain
    _draw_bars(video, scenes, np.rint(level))
    return video


def classify(
    scenes: Scenes, motion: Motion, frames: int, height: int, width: int, fps: float
) -> Video:
    """Draws the objects alone, each in the colour of its shape, on black.

    A segmentation of what `render` shows, with the same arguments: where the camera
    looks, but not the light. What the bar hides is black.
    """
    times = np.arange(frames) / fps
    video = np.zeros((len(scenes.ids), frames, height, width, 3), np.uint8)
    paint = SHAPE_PALETTE[scenes.shape][:, None].repeat(frames, 1)
    _draw_all(video, scenes, motion, times, paint, signed_distance, HALF_EXTENTS)
    _draw_bars(video, scenes, np.zeros((len(scenes.ids), frames)))
    return video


def _draw_all(
    video: Video,
    scenes: Scenes,
    motion: Motion,
    times: Float[np.ndarray, " T"],
    paint: Float[np.ndarray, "b T o 3"],
    distance: Callable[..., np.ndarray],
    half_extents: Float[np.ndarray, "shapes 2 2"],
) -> None:
    """Draws the objects of each scene over what is there."""
    _, _, height, width, _ = video.shape
    scale = min(height, width)
    centre = motion.positions(times)
    centre[..., 0] += scenes.pan_offset(times)[..., None]
    centre *= scale
    kinds, size, *places = _windows(scenes, centre, half_extents, height, width)
    radius = (scenes.radius * scale).astype(np.float32) * 256
    paint = np.rint(paint).astype(np.uint16)
    for slot in range(MAX_OBJECTS):  # in turn, so that later objects lie on top
        filled = np.flatnonzero(scenes.present[:, slot])
        for kind in set(kinds[filled, slot].tolist()):
            rows = filled[kinds[filled, slot] == kind]
            _draw_objects(
                video,
                rows,
                functools.partial(distance, kind % len(SHAPES)),
                size[rows[0], slot].tolist(),
                *(place[rows, :, slot] for place in places),
                radius[rows, slot],
                paint[rows, :, slot],
            )


def _draw_bars(video: Video, scenes: Scenes, level: Float[np.ndarray, "b T"]) -> None:
    """Draws the bar of each scene that has one over what is there, in grey."""
    scale = min(video.shape[2:4])
    for row in np.flatnonzero(scenes.bar):
        left, right = np.rint(scenes.bar_span[row] * scale).astype(int)
        video[row, :, :, left:right] = level[row][:, None, None, None]


def _coverage(
    edges: np.ndarray, low: np.ndarray | float, high: np.ndarray | float
) -> np.ndarray:
    """Part of each pixel between consecutive edges that lies in [low, high]."""
    return np.diff(np.clip(edges, low, high)) / np.diff(edges)


def _stripes(edges: np.ndarray) -> np.ndarray:
    """Part of each pixel that lies in the odd stripes, from their antiderivative."""
    period = edges / (2 * _STRIPE)
    whole = np.floor(period)
    area = 0.5 * whole + np.maximum(period - whole - 0.5, 0)
    return np.diff(area) / np.diff(period)


def background_parts(
    arena: Float[np.ndarray, "2 2"],
    offset: Float[np.ndarray, " T"],
    height: int,
    width: int,
    scale: int,
    step: int = 1,
) -> Float[np.ndarray, "4 T h w"]:
    """What a background is a sum of: all, the arena, its stripes, its checkerboard.

    Args:
        arena: (left, top) and (right, bottom) of the walls.
        offset: shift of the scenery to the right in each frame.
        height: of the frame in pixels.
        width: of the frame in pixels.
        scale: the frame's short side in pixels.
        step: every how many pixels are wanted, down and across.

    Returns:
        The share of each of those pixels that each part covers.
    """
    across = np.arange(width + 1) / scale - offset[:, None]
    down = np.arange(height + 1) / scale
    low, high = arena
    inside_x = _coverage(across, low[:1], high[:1])[:, None, ::step]
    inside = inside_x * _coverage(down, low[1:], high[1:])[::step, None]
    odd_x, odd_y = _stripes(across)[:, None, ::step], _stripes(down)[::step, None]
    odd = odd_x + odd_y * (1 - 2 * odd_x)
    parts = np.ones_like(inside), inside, inside * odd_x, inside * odd
    return np.stack(parts).astype(np.float32)


def _three(grey: np.ndarray) -> np.ndarray:
    """Grey values as RGB; twice as fast as `np.repeat`."""
    rgb = np.empty((*grey.shape, 3), grey.dtype)
    for channel in range(3):
        rgb[..., channel] = grey
    return rgb


def _draw_backgrounds(
    video: np.ndarray, scenes: Scenes, offset: np.ndarray, gain: np.ndarray, scale: int
) -> None:
    """Fills the frames with textured arenas inside their walls, under the light."""
    _, frames, height, width, _ = video.shape
    striped = (scenes.texture > TEXTURES.index("plain"))[:, None, None]
    checkered = scenes.texture == TEXTURES.index("checkered")
    wall = WALL_LEVELS[scenes.tone]
    step = (TONE_LEVELS[scenes.tone] - wall)[:, None, None]
    gain = gain.astype(np.float32)[..., None, None]
    still, panned = np.flatnonzero(scenes.pan == 0), np.flatnonzero(scenes.pan)
    for rows, shown in ((still, slice(1)), (panned, slice(None))):
        across = np.arange(width + 1) / scale - offset[rows, shown, None]
        low, high = scenes.arena[rows, :, :1].swapaxes(0, 1)[..., None]
        inside, odd = _coverage(across, low, high), _stripes(across)
        # level = wall + y * (x + odd_y * cross): odd_x xor odd_y on a checkerboard.
        x = inside * (step[rows] + TEXTURE_STEP * striped[rows] * odd)
        cross = TEXTURE_STEP * inside * (1 - 2 * odd)
        x, cross = (v.astype(np.float32)[:, :, None] for v in (x, cross))
        for row, one, other in zip(rows.tolist(), x, cross, strict=True):
            y, odd_y, line = _lines(*scenes.arena[row, :, 1].tolist(), height, scale)
            level = y * one
            if checkered[row]:
                level += odd_y * other
            level += np.float32(wall[row])
            level = level * gain[row, slice(None) if scenes.light[row] else shown]
            level += np.float32(0.5)
            lines = _three(level.astype(np.uint8))
            if len(lines) < frames:
                video[row] = lines.take(line, 1)
            else:
                lines.take(line, 1, video[row], "clip")


@functools.lru_cache(64)
def _lines(
    low: float, high: float, height: int, scale: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The few kinds of lines of pixels that a background has.

    Returns:
        The part of each kind that lies between the walls (as a column), that part
        times the part in odd stripes, and the kind of each line.
    """
    down = np.arange(height + 1) / scale
    inside = _coverage(down, low, high).astype(np.float32)
    odd = inside * _stripes(down).astype(np.float32)
    both = inside + 1j * odd
    _, first, line = np.unique(both, return_index=True, return_inverse=True)
    return inside[first, None], odd[first, None], line


def signed_distance(
    shape: int,
    x: Float[np.ndarray, "*#points"],
    y: Float[np.ndarray, "*#points"],
    radius: Float[np.ndarray, "*#points"],
) -> Float[np.ndarray, "*#points"]:
    """Distance of points to the edge of `SHAPES[shape]` at the origin, < 0 inside.

    Exact on the sides; around corners a lower bound. In the units of the arguments,
    which may broadcast.
    """
    low, high = HALF_EXTENTS[shape].astype(x.dtype)
    name = SHAPES[shape]
    if name == "circle":
        return np.sqrt(x * x + y * y) - radius
    side_x = np.abs(x)
    if name == "triangle":
        slope = x.dtype.type(np.sqrt(0.75))
        return np.maximum(y, slope * side_x - y / 2) - high[1] * radius
    side_y = np.abs(y)
    if name == "square":
        return np.maximum(side_x, side_y) - low[0] * radius
    if name == "diamond":
        return (side_x + side_y - low[0] * radius) * x.dtype.type(np.sqrt(0.5))
    length = low[0] * radius
    thickness = x.dtype.type(CROSS_THICKNESS) * length
    return np.minimum(
        np.maximum(side_x - length, side_y - thickness),
        np.maximum(side_x - thickness, side_y - length),
    )


def _windows(
    scenes: Scenes,
    centre: np.ndarray,
    half_extents: np.ndarray,
    height: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The windows in which objects are drawn, those of a kind together.

    Returns:
        Of each object its kind (its shape, plus `len(SHAPES)` times a step of radius),
        and `size`, `corner`, `start` and `ahead` as in `_draw_objects`.
    """
    frame = np.array([width, height])
    extents, scale = half_extents[scenes.shape], frame.min()
    # Distances are rounded as from this pixel, whichever objects are drawn together.
    steps = np.ceil(scenes.radius / _ROUNDING_STEP).astype(int)
    reach = extents * (steps * _ROUNDING_STEP * scale)[..., None, None]
    origin = np.floor(centre - reach[:, None, :, 0] - 1).astype(int)
    most = frame - np.ceil(reach.sum(2)).astype(int) - 3
    origin = np.clip(origin, 0, most[:, None])
    start = (origin + 0.5 - centre).astype(np.float32) * 256
    # A window holds the largest object of the kind.
    kinds = steps * len(SHAPES) + scenes.shape
    largest = np.zeros(kinds.max(initial=0) + 1)
    np.maximum.at(largest, kinds, scenes.radius * scale)
    reach = extents * (largest[kinds] + _SOFT_EDGE)[..., None, None]
    size = np.floor(reach.sum(2)).astype(int) + 1
    corner = np.ceil(centre - reach[:, None, :, 0] - 0.5).astype(int)
    corner = np.clip(corner, 0, frame - size[:, None])
    return kinds, size, corner, start, (corner - origin).astype(np.float32) * 256


def _draw_objects(
    video: Video,
    rows: Int[np.ndarray, " n"],
    distance: Callable[..., np.ndarray],
    size: list[int],
    corner: Int[np.ndarray, "n T 2"],
    start: Float[np.ndarray, "n T 2"],
    ahead: Float[np.ndarray, "n T 2"],
    radius: Float[np.ndarray, " n"],
    paint: UInt16[np.ndarray, "n T 3"],
) -> None:
    """Blends one object of a shape into each of the given rows.

    Each is drawn in a window, (width, height) pixels large, of which `corner` is the
    first pixel. The middle of that is at `start` plus `ahead`, a whole number, from the
    object's centre. These and `radius` are in units of 1 / 256 pixel, in which coverage
    is a whole number.
    """
    columns, lines = (np.arange(0, 256 * n, 256, np.float32) for n in size)
    x = (start[..., :1] + (ahead[..., :1] + columns))[..., None, :]
    y = (start[..., 1:] + (ahead[..., 1:] + lines))[..., :, None]
    radius = radius[:, None, None, None]
    alpha = np.float32(128) - distance(x, y, radius)
    np.clip(alpha, 0, 256, out=alpha)
    alpha += np.float32(0.5)
    alpha = _three(alpha.astype(np.uint16)).reshape(*alpha.shape[:-1], -1)
    paint = np.tile(paint, (1, 1, size[0]))[..., None, :]

    _, frames, height, width, _ = video.shape
    steps = *video.strides[:3], 1  # a byte a column
    room = height - size[1] + 1, 3 * (width - size[0]) + 1
    windows = as_strided(
        video, (len(video), frames, *room, size[1], 3 * size[0]), (*steps, *steps[2:])
    )
    where = rows[:, None], np.arange(frames), corner[..., 1], 3 * corner[..., 0]
    # 255 * 256 + 128 just fits into 16 bits.
    mixed = np.uint16(256) - alpha
    mixed *= windows[where].astype(np.uint16)
    alpha *= paint
    mixed += alpha
    mixed += np.uint16(128)
    mixed >>= np.uint16(8)
    windows[where] = mixed.astype(np.uint8)
