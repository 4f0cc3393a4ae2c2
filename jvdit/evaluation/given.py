"""How clips keep to what they were given: frames, paths, masks.

Units are those of `world.scene`, dimension names those of `tracks`; given frames are of
a scene whose exact continuation is known.
"""

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.world.mechanics import simulate
from jvdit.data.world.scene import Scenes
from jvdit.evaluation.oracle.detection import Detections, Video
from jvdit.evaluation.oracle.tracks import PerClip, PerObject, Tracks, largest_by


def position_error(
    tracks: Tracks, scenes: Scenes, fps: float
) -> Float[np.ndarray, "b T"]:
    """Distance of objects from where they truly are in each frame, in radii.

    It is the mean over the objects of a clip; NaN where none is seen. By frame it tells
    how far into the future a clip that was given its beginning is right.

    Args:
        tracks: the tracks of the captioned objects.
        scenes: the true scenes, with their positions and velocities.
        fps: frames per second.
    """
    true = _true_path(tracks, scenes, fps)
    error = np.linalg.norm(tracks.whole - true, axis=-1)
    error /= scenes.radius[tracks.clip, tracks.slot][:, None]
    seen = np.isfinite(error)
    total, count = np.zeros((2, len(scenes.ids), error.shape[1]))
    np.add.at(total, tracks.clip, np.where(seen, error, 0.0))
    np.add.at(count, tracks.clip, seen)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def velocity_jump(tracks: Tracks, scenes: Scenes, fps: float, frame: int) -> PerClip:
    """Largest error of the step that leads from the given frames into the others.

    In short sides per second; NaN where no object is seen on both sides.

    Args:
        tracks: the tracks of the captioned objects.
        scenes: the true scenes, with their positions and velocities.
        fps: frames per second.
        frame: index of the first frame that isn't given, at least 1.
    """
    true = _true_path(tracks, scenes, fps)
    step, right = (x[:, frame] - x[:, frame - 1] for x in (tracks.whole, true))
    jump = np.linalg.norm(step - right, axis=-1) * fps
    return largest_by(tracks.clip, jump, len(scenes.ids))


def kept(
    video: Video,
    given: Video,
    where: Bool[np.ndarray, "b T H W"],
) -> PerClip:
    """PSNR in dB of what was given: pixels, or whole frames; NaN where nothing was.

    Args:
        video: generated clips, RGB in [0, 255].
        given: what they should keep.
        where: which pixels are given.
    """
    error = (video.astype(np.float32) - given) ** 2
    count = where.sum((1, 2, 3))
    mean = (error.mean(-1) * where).sum((1, 2, 3)) / np.maximum(count, 1)
    psnr = 10 * np.log10(255**2 / np.maximum(mean, 1e-3))
    return np.where(count > 0, psnr, np.nan)


def path_error(tracks: Tracks, paths: Float[np.ndarray, "n T 2"]) -> PerObject:
    """Mean distance of each object from the path that it was to follow, in radii.

    Args:
        tracks: the tracks of the captioned objects.
        paths: where each of them should be in each frame, in short sides.
    """
    error = np.linalg.norm(tracks.whole - paths, axis=-1)
    seen = np.isfinite(error)
    mean = np.where(seen, error, 0).sum(1) / np.maximum(seen.sum(1), 1)
    return np.where(seen.any(1), mean / tracks.radius, np.nan)


def mask_overlap(found: Detections, masks: Bool[np.ndarray, "b T H W"]) -> PerClip:
    """Intersection over union of all objects with the masks that they were to fill."""
    both = (found.objects & masks).sum((1, 2, 3))
    return both / np.maximum((found.objects | masks).sum((1, 2, 3)), 1)


def _true_path(
    tracks: Tracks, scenes: Scenes, fps: float
) -> Float[np.ndarray, "n T 2"]:
    times = np.arange(tracks.whole.shape[1]) / fps
    motion = simulate(scenes, float(times[-1]) + 1 / fps)
    return motion.positions(times)[tracks.clip, :, tracks.slot]
