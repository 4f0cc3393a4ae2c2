"""Prompt adherence: whether a clip of the procedural world shows what its caption says.

Every word that can be seen is compared: of each object its color, shape, size, speed
and direction, of the scene its background, light, camera, bar and gravity. Units are
those of `world.scene`, dimension names those of `tracks`.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from jvdit.data.world.scene import (
    COLORS,
    DIRECTIONS,
    GRAVITY,
    RADII,
    RATES,
    SHAPES,
    SIZES,
    SPEEDS,
    TEXTURES,
    TONES,
    Scenes,
)
from jvdit.evaluation.oracle.detection import Detections
from jvdit.evaluation.oracle.outlines import shapes_of
from jvdit.evaluation.oracle.scenery import Scenery
from jvdit.evaluation.oracle.tracks import Bounces, Tracks, enough_frames

_MOST_TURN = 30.0  # most degrees between the captioned and the measured direction
_FLIGHT = 0.25  # seconds from the start in which the first velocity is measured
_LEAST_STEP = 0.5 / 64  # an object that moves less in that time stands still
_LASTING = 0.9  # least share of frames that show just the captioned objects
# Of an object's attributes.
_WORDS = {"shape": SHAPES, "size": SIZES, "direction": DIRECTIONS, "speed": SPEEDS}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What clips show of what captions tell.

    Attributes:
        found: whether each captioned object's color is found.
        shape: its shape, index in `SHAPES`; -1: none of them.
        size: 1 if its radius is nearer to the world's large one than to the small one.
        direction: its first direction in degrees, clockwise from right; NaN: it stands.
        speed: its first speed, in short sides per second; NaN: it is never seen.
        count: how many objects each clip shows.
        lasting: share of the frames that show the captioned objects and no others.
        falling: whether its objects are pulled down.
        scenery: everything else.
    """

    found: Bool[np.ndarray, " n"]
    shape: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    direction: Float[np.ndarray, " n"]
    speed: Float[np.ndarray, " n"]
    count: Int[np.ndarray, " b"]
    lasting: Float[np.ndarray, " b"]
    falling: Bool[np.ndarray, " b"]
    scenery: Scenery

    @property
    def fast(self) -> Int[np.ndarray, " n"]:
        """1 if an object's speed is nearer to the world's fast one than to slow."""
        return (self.speed > np.sqrt(np.prod(RATES))).astype(int)

    @property
    def octant(self) -> Int[np.ndarray, " n"]:
        """The direction's index in `DIRECTIONS`; -1: the object stands still."""
        index = np.rint(np.nan_to_num(self.direction) / 45).astype(int)
        return np.where(np.isnan(self.direction), -1, index % len(DIRECTIONS))

    @property
    def attributes(self) -> dict[str, Int[np.ndarray, " n"]]:
        """The index of each object's attributes in their words, by name; -1: none."""
        values = self.shape, self.size, self.octant, self.fast
        return dict(zip(_WORDS, values, strict=True))


def read(
    found: Detections,
    tracks: Tracks,
    bounces: Bounces,
    pull: Float[np.ndarray, " n"],
    scenery: Scenery,
    scenes: Scenes,
    fps: float,
) -> Reading:
    """Measures what the captions tell.

    Args:
        found: the detections in the clips.
        tracks: the tracks of the captioned objects.
        bounces: their bounces.
        pull: downward acceleration of each object, from `falling`.
        scenery: what is to be seen beside the objects.
        scenes: the scenes that the captions describe; their positions and velocities
            are not used.
        fps: frames per second.
    """
    there = found.present.mean(1) >= enough_frames(scenes)
    velocity = _first_velocity(tracks, bounces, scenes, fps)
    speed = np.linalg.norm(velocity, axis=-1)
    angle = np.degrees(np.arctan2(velocity[:, 1], velocity[:, 0]))
    pulls = np.bincount(tracks.clip, np.nan_to_num(pull), len(scenes.ids))
    return Reading(
        found=tracks.found,
        shape=shapes_of(found, tracks),
        size=(tracks.radius > np.mean(RADII)).astype(int),
        direction=np.where(speed * _FLIGHT > _LEAST_STEP, angle, np.nan),
        speed=speed,
        count=(there * _typical(found.pieces, found.present)).sum(1),
        lasting=_lasting(found, scenes),
        falling=pulls / scenes.count > GRAVITY / 2,
        scenery=scenery,
    )


def compare(
    reading: Reading, tracks: Tracks, scenes: Scenes
) -> dict[str, Bool[np.ndarray, " n"]]:
    """Whether each attribute of each captioned object is as the caption says."""
    at = tracks.clip, tracks.slot
    right = {k: x == getattr(scenes, k)[at] for k, x in reading.attributes.items()}
    turn = (reading.direction - 45.0 * scenes.direction[at] + 180) % 360 - 180
    right["direction"] = np.abs(turn) <= _MOST_TURN
    found = {name: reading.found & x for name, x in right.items()}
    return {"color": reading.found} | found


def adherence(
    reading: Reading, tracks: Tracks, scenes: Scenes
) -> dict[str, Float[np.ndarray, " b"]]:
    """Scores clips against the scenes that their captions describe.

    Returns:
        For each clip, in [0, 1]: "count", whether the number of objects is right;
        "lasting", whether just the captioned objects are there all the time; "color",
        "shape", "size", "direction" and "speed", the share of the captioned objects
        that are found, and found with the right attribute; "background", "light",
        "camera", "bar" and "falling", whether these are right, "bar" NaN where the
        caption has none; "binding", the share of the objects that have an attribute of
        another one instead of their own, NaN where there is one; "all", whether
        everything is right.
    """
    seen, compared = reading.scenery, compare(reading, tracks, scenes)
    scores = {"count": reading.count == scenes.count}
    scores["lasting"] = reading.lasting >= _LASTING
    for name, right in compared.items():
        scores[name] = np.bincount(tracks.clip, right, len(scenes.ids)) / scenes.count
    scores |= {
        "background": (seen.tone == scenes.tone) & (seen.texture == scenes.texture),
        "light": seen.light == scenes.light,
        "camera": seen.pan == scenes.pan,
        "bar": np.where(scenes.bar, seen.bar, np.nan),
        "falling": reading.falling == scenes.gravity,
    }
    scores = {name: value.astype(float) for name, value in scores.items()}
    every = np.nan_to_num(np.stack(list(scores.values())), nan=1.0)
    scores["all"] = np.floor(every.min(0))
    scores["binding"] = _binding(reading, compared, tracks, scenes)
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
        way = "standing"
        if reading.octant[i] >= 0:
            way = f"{SPEEDS[reading.fast[i]]} {DIRECTIONS[reading.octant[i]]}"
        seen.append(f"{SIZES[reading.size[i]]} {name} {shape} {way}")
    return f"{reading.count[clip]} objects: {', '.join(seen)}"


def confusions(
    reading: Reading, tracks: Tracks, scenes: Scenes
) -> dict[str, tuple[tuple[str, ...], Int[np.ndarray, "told seen"]]]:
    """How often each attribute that captions tell is seen as each other one.

    Returns:
        The words of each attribute, and a matrix of counts by what is told and what is
        seen. Its last column counts what is none of them, or isn't found.
    """
    at, seen = (tracks.clip, tracks.slot), reading.scenery
    pairs = {
        name: (_WORDS[name], getattr(scenes, name)[at], np.where(reading.found, x, -1))
        for name, x in reading.attributes.items()
    }
    pairs["tone"] = TONES, scenes.tone, seen.tone
    pairs["texture"] = TEXTURES, scenes.texture, seen.texture
    found = {}
    for name, (words, told, seen_as) in pairs.items():
        counts = np.zeros((len(words), len(words) + 1), int)
        np.add.at(counts, (told, seen_as), 1)
        found[name] = tuple(words), counts
    return found


def _binding(reading, compared, tracks, scenes) -> Float[np.ndarray, " b"]:
    """The share of objects with an attribute of another one in the place of theirs."""
    clip, slot = tracks.clip, tracks.slot
    swapped = np.zeros(len(clip), bool)
    for name, value in reading.attributes.items():
        told = np.where(scenes.present, getattr(scenes, name), -2)[clip]
        other = value != told[np.arange(len(clip)), slot]
        wrong = reading.found & ~compared[name] & other
        swapped |= wrong & (told == value[:, None]).any(1)
    share = np.bincount(clip, swapped, len(scenes.ids)) / scenes.count
    return np.where(scenes.count > 1, share, np.nan)


def _lasting(found: Detections, scenes: Scenes) -> Float[np.ndarray, " b"]:
    """The share of frames that show just the captioned objects, one of each color.

    Behind a bar an object may be hidden.
    """
    told = np.zeros((len(scenes.ids), len(COLORS)), bool)
    clip, slot = np.nonzero(scenes.present)
    told[clip, scenes.color[clip, slot]] = True
    shown = found.present & (found.pieces == 1)
    missing = (told[:, None] & ~found.present & ~scenes.bar[:, None, None]).any(-1)
    extra = (found.present & ~told[:, None]).any(-1)
    double = (found.present & ~shown & ~scenes.bar[:, None, None]).any(-1)
    return 1 - (missing | extra | double).mean(1)


def _typical(pieces: Int[np.ndarray, "b T k"], present: np.ndarray) -> np.ndarray:
    """The number of pieces of each color, 1 unless most frames show several."""
    many = (pieces > 1).sum(1) > 0.5 * present.sum(1)
    most = np.where(pieces > 1, pieces, 0).max(1)
    return np.where(many, most, 1)


def _first_velocity(
    tracks: Tracks, bounces: Bounces, scenes: Scenes, fps: float
) -> Float[np.ndarray, "n 2"]:
    """The velocity (x, y) with which each object sets out; NaN if it is never seen.

    It is that of a line fitted to the positions up to the first bounce.
    """
    frames = tracks.area.shape[1]
    last = np.full(len(tracks.clip), max(2, round(_FLIGHT * fps) + 1) - 1)
    np.minimum.at(last, bounces.track, np.maximum(bounces.interval, 1))
    times = np.arange(frames) / fps
    path = tracks.centre.copy()
    gravity = scenes.gravity[tracks.clip] * GRAVITY
    path[..., 1] -= 0.5 * gravity[:, None] * times**2
    seen = np.isfinite(path[..., 0]) & (np.arange(frames) <= last[:, None])
    count = np.maximum(seen.sum(1, keepdims=True), 1)
    t = np.where(seen, times - (seen * times).sum(1, keepdims=True) / count, 0.0)
    moments = (t[..., None] * np.nan_to_num(path)).sum(1)
    velocity = moments / np.maximum((t**2).sum(1, keepdims=True), 1e-9)
    return np.where(seen.sum(1, keepdims=True) > 1, velocity, np.nan)
