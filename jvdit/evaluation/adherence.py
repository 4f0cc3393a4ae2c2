"""Prompt adherence: whether a clip of the procedural world shows what its caption says.

Each captioned object is compared in color, shape, size and initial direction. Units are
those of `world.scene`, dimension names those of `tracks`.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int

from jvdit.data.world.render import signed_distance
from jvdit.data.world.scene import (
    COLORS,
    DIRECTIONS,
    GRAVITY,
    RADII,
    SHAPES,
    SIZES,
    Scenes,
)
from jvdit.evaluation.detection import Detections
from jvdit.evaluation.tracks import Tracks, enough_frames, quantile

_SHAPE_FRAMES = 5  # frames in which the shape is measured
_LEAST_IOU = 0.70
_MOST_TURN = 30.0  # most degrees between the captioned and the measured direction
_FLIGHT = 0.25  # seconds from the start in which the direction is measured
_LEAST_STEP = 0.5 / 64  # an object that moves less in that time stands still


@dataclasses.dataclass(frozen=True)
class Reading:
    """The measured attributes of each captioned object.

    Attributes:
        found: whether the object's color is found.
        shape: measured shape, index in `SHAPES`; -1: none fits.
        large: whether its radius is nearer to the world's large one than the small one.
        angle: initial direction in degrees, clockwise from right; NaN: it stands still.
        objects: how many objects each clip shows.
    """

    found: Bool[np.ndarray, " n"]
    shape: Int[np.ndarray, " n"]
    large: Bool[np.ndarray, " n"]
    angle: Float[np.ndarray, " n"]
    objects: Int[np.ndarray, " b"]


def read(found: Detections, tracks: Tracks, scenes: Scenes, fps: float) -> Reading:
    """Measures the attributes of the captioned objects in the clips.

    Args:
        found: the detections in the clips.
        tracks: the tracks of the captioned objects.
        scenes: the scenes that the captions describe; their positions and velocities
            are not used.
        fps: frames per second.
    """
    there = found.present.mean(1) >= enough_frames(scenes)
    return Reading(
        found=tracks.found,
        shape=_shapes(found, tracks),
        large=tracks.radius > np.mean(RADII),
        angle=_first_direction(tracks, scenes.gravity[tracks.clip] * GRAVITY, fps),
        objects=(there * _typical(found.pieces, found.present)).sum(1),
    )


def compare(
    reading: Reading, tracks: Tracks, scenes: Scenes
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Whether each attribute of each captioned object is as the caption says."""
    clip, slot = tracks.clip, tracks.slot
    turn = (reading.angle - 45.0 * scenes.direction[clip, slot] + 180) % 360 - 180
    return {
        "color": reading.found,
        "shape": reading.found & (reading.shape == scenes.shape[clip, slot]),
        "size": reading.found & (reading.large == (scenes.size[clip, slot] == 1)),
        "direction": reading.found & (np.abs(turn) <= _MOST_TURN),
    }


def adherence(
    reading: Reading, tracks: Tracks, scenes: Scenes
) -> dict[str, Float[np.ndarray, " b"]]:
    """Scores clips against the scenes that their captions describe.

    Returns:
        For each clip, in [0, 1]: "count", whether the number of objects is right;
        "color", "shape", "size" and "direction", the share of the captioned objects
        that are found, and found with the right attribute; "all", whether everything
        is right.
    """
    scores = {"count": (reading.objects == scenes.count).astype(float)}
    for name, right in compare(reading, tracks, scenes).items():
        hits = np.bincount(tracks.clip, right, len(scenes.ids))
        scores[name] = hits / scenes.count
    scores["all"] = np.floor(np.min(list(scores.values()), axis=0))
    return scores


def describe(reading: Reading, tracks: Tracks, clip: int) -> str:
    """Describes the measured objects of a clip in the words of captions."""
    seen = []
    for i in np.flatnonzero(tracks.clip == clip):
        name = COLORS[tracks.color[i]]
        if not reading.found[i]:
            seen.append(f"no {name}")
            continue
        shape = SHAPES[reading.shape[i]] if reading.shape[i] >= 0 else "blob"
        angle = reading.angle[i]
        way = "standing"
        if np.isfinite(angle):
            way = DIRECTIONS[round(angle / 45) % len(DIRECTIONS)]
        seen.append(f"{SIZES[int(reading.large[i])]} {name} {shape} {way}")
    return f"{reading.objects[clip]} objects: {', '.join(seen)}"


def _typical(pieces: Int[np.ndarray, "b T k"], present: np.ndarray) -> np.ndarray:
    """The number of pieces of each color, 1 unless most frames show several."""
    many = (pieces > 1).sum(1) > 0.5 * present.sum(1)
    most = np.where(pieces > 1, pieces, 0).max(1)
    return np.where(many, most, 1)


def _first_direction(
    tracks: Tracks, gravity: Float[np.ndarray, " n"], fps: float
) -> Float[np.ndarray, " n"]:
    """The initial direction of each object in degrees, clockwise from right.

    It is that of a line fitted to the first positions; NaN if the object stands still.
    """
    flight = max(2, min(tracks.area.shape[1], math.floor(_FLIGHT * fps) + 1))
    times = np.arange(flight) / fps
    path = tracks.centre[:, :flight].copy()
    path[..., 1] -= 0.5 * gravity[:, None] * times**2
    seen = np.isfinite(path[..., 0])
    count = np.maximum(seen.sum(1, keepdims=True), 1)
    t = np.where(seen, times - (seen * times).sum(1, keepdims=True) / count, 0.0)
    moments = (t[..., None] * np.nan_to_num(path)).sum(1)
    velocity = moments / np.maximum((t**2).sum(1, keepdims=True), 1e-9)
    moved = np.linalg.norm(velocity, axis=-1) * times[-1] > _LEAST_STEP
    angle = np.degrees(np.arctan2(velocity[:, 1], velocity[:, 0]))
    return np.where(moved & (seen.sum(1) > 1), angle, np.nan)


def _shapes(found: Detections, tracks: Tracks) -> Int[np.ndarray, " n"]:
    """The shape whose template each object overlaps best; -1 if none fits.

    Templates of the object's area are centered on it, in frames of typical area.
    """
    clip, color, side = tracks.clip, tracks.color, found.side
    height, width = found.coverage.shape[2:]
    typical = np.nan_to_num(quantile(tracks.area, 0.75))
    unlike = np.abs(np.nan_to_num(tracks.area, nan=-9.0) - typical[:, None])
    largest = math.sqrt(max(typical.max(initial=0.0), 0.01) / math.pi) * side
    window = np.arange(-math.ceil(1.65 * largest) - 1, math.ceil(1.65 * largest) + 2)
    overlap = np.zeros((len(clip), len(SHAPES)))
    frames = np.argsort(unlike, axis=1)[:, :_SHAPE_FRAMES].T
    for frame in frames:
        x, y = np.moveaxis(found.centre[clip, frame, color], -1, 0)
        columns = np.floor(x)[:, None].astype(int) + window
        rows = np.floor(y)[:, None].astype(int) + window
        inside = ((rows >= 0) & (rows < height))[:, :, None]
        inside = inside & ((columns >= 0) & (columns < width))[:, None]
        at = (
            clip[:, None, None],
            frame[:, None, None],
            rows.clip(0, height - 1)[:, :, None],
            columns.clip(0, width - 1)[:, None],
        )
        own = inside & (found.color[at] == color[:, None, None])
        covered = found.coverage[at] * own
        right = (columns + 0.5 - x[:, None])[:, None]
        down = (rows + 0.5 - y[:, None])[:, :, None]
        radius = np.sqrt(found.area[clip, frame, color] / np.pi)[:, None, None]
        for shape in range(len(SHAPES)):
            template = np.clip(0.5 - signed_distance(shape, right, down, radius), 0, 1)
            both = np.minimum(covered, template).sum((1, 2))
            either = np.maximum(covered, template).sum((1, 2))
            overlap[:, shape] += both / np.maximum(either, 1e-6) / len(frames)
    return np.where(overlap.max(1) > _LEAST_IOU, overlap.argmax(1), -1)
