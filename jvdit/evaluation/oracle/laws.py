"""Whether objects move by the world's laws: each frame is foretold from those before.

The state of a scene in two frames that follow one another, continued by the world's own
mechanics (walls, collisions, gravity), says where every object is two frames later.
Units are those of `world.scene`, dimension names those of `tracks`.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.mechanics import PAIR, simulate
from jvdit.data.world.scene import GRAVITY, MAX_OBJECTS, Scenes
from jvdit.evaluation.oracle.tracks import PerClip, Tracks

_AHEAD = 2  # frames
_COLLIDED = 3.0  # factor by which a collision magnifies errors
_AWAY = -9.0  # where objects are put that aren't seen


def foretold(tracks: Tracks, scenes: Scenes, fps: float, tolerance: float) -> PerClip:
    """The share of the positions in clips that the world's laws foretell.

    Where an object has just bounced, its speed isn't known and nothing is foretold.

    Args:
        tracks: the tracks of the captioned objects.
        scenes: the scenes that the captions describe, with their walls.
        fps: frames per second.
        tolerance: largest error of a position, in short sides.

    Returns:
        The share of each clip, NaN where nothing can be foretold.
    """
    error, known = errors(tracks, scenes, fps)
    right = ((error < tolerance) & known).sum(1)
    right = np.bincount(tracks.clip, right, len(scenes.ids))
    total = np.bincount(tracks.clip, known.sum(1), len(scenes.ids))
    return np.where(total > 0, right / np.maximum(total, 1), np.nan)


def errors(
    tracks: Tracks, scenes: Scenes, fps: float
) -> tuple[Float[np.ndarray, "n t"], Bool[np.ndarray, "n t"]]:
    """The error of each foretold position, and whether it can be foretold.

    Column i is foretold from frames i and i + 1.
    """
    clips, frames = len(scenes.ids), tracks.whole.shape[1]
    starts = max(frames - 1 - _AHEAD, 0)
    clip, slot = tracks.clip, tracks.slot
    path = np.full((clips, frames, MAX_OBJECTS, 2), np.nan)
    path[clip, :, slot] = tracks.whole
    now, before = path[:, 1 : 1 + starts], path[:, :starts]
    velocity = (now - before) * fps
    velocity[..., 1] += (GRAVITY * scenes.gravity / (2 * fps))[:, None, None]
    away = np.stack([_AWAY - np.arange(MAX_OBJECTS), np.full(MAX_OBJECTS, _AWAY)], -1)
    unseen = ~np.isfinite(velocity)
    radius = scenes.radius.copy()
    radius[clip, slot] = np.where(np.isfinite(tracks.radius), tracks.radius, 0.1)
    every = np.repeat(np.arange(clips), starts)
    states = scenes.choose(every)
    states = dataclasses.replace(
        states,
        position=np.where(unseen, away, now).reshape(-1, MAX_OBJECTS, 2),
        velocity=np.where(unseen, 0.0, velocity).reshape(-1, MAX_OBJECTS, 2),
        radius=radius[every],
    )
    motion = simulate(states, _AHEAD / fps)
    then = motion.positions(np.array([_AHEAD / fps]))[:, 0]
    then = then.reshape(clips, starts, MAX_OBJECTS, 2)
    error = np.linalg.norm(path[:, 1 + _AHEAD :] - then, axis=-1)
    bounced, met = np.zeros((2, len(every), MAX_OBJECTS + 1), bool)
    row, event = np.nonzero(motion.time < 1 / fps)
    bounced[row, motion.first[row, event]] = True
    bounced[row, motion.second[row, event]] = True
    row, event = np.nonzero(np.isfinite(motion.time) & (motion.kind == PAIR))
    met[row, motion.first[row, event]] = met[row, motion.second[row, event]] = True
    shape = clips, starts, MAX_OBJECTS
    bounced, met = (x[:, :-1].reshape(shape) for x in (bounced, met))
    error /= np.where(met, _COLLIDED, 1.0)
    known = np.isfinite(error) & ~unseen.any(-1)
    known[:, 1:] &= ~bounced[:, :-1]  # the interval of the speed holds a bounce
    return error[clip, :, slot], known[clip, :, slot]
