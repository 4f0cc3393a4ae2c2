"""Draws the oracle's detections over a clip."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from jvdit.data.world.render import PALETTE
from jvdit.data.world.scene import COLORS
from jvdit.evaluation.oracle.detection import Detections

_LEAST_HEIGHT = 192  # pixels; smaller clips are enlarged


def overlay(
    video: UInt8[np.ndarray, "T H W 3"], found: Detections, clip: int
) -> UInt8[np.ndarray, "T h w 3"]:
    """Draws a circle around each detected object, and its path so far.

    The circle has the area of the detection; it is dashed if that isn't one compact
    object. Small clips are enlarged.

    Args:
        video: RGB in [0, 255].
        found: the detections in a batch of clips.
        clip: index of this clip in the batch.
    """
    factor = -(-_LEAST_HEIGHT // video.shape[1])
    height, width = (factor * size for size in video.shape[1:3])
    height, width = height + height % 2, width + width % 2  # as H.264 wants
    centre, area = found.centre[clip] * factor, found.area[clip] * factor**2
    seen = area > 0
    paint = [tuple(int(v) for v in np.rint(0.5 * color + 127)) for color in PALETTE]
    frames = []
    for t, picture in enumerate(video):
        size = width, height
        image = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(image)
        for k in range(len(COLORS)):
            path = centre[: t + 1, k][found.present[clip, : t + 1, k]]
            if len(path) > 1:
                draw.line([tuple(p) for p in path.tolist()], fill=paint[k], width=2)
            if not seen[t, k] or found.pieces[clip, t, k] == 0:
                continue
            radius = float(np.sqrt(area[t, k] / np.pi))
            x, y = centre[t, k].tolist()
            box = (x - radius, y - radius, x + radius, y + radius)
            if found.present[clip, t, k] and found.pieces[clip, t, k] == 1:
                draw.ellipse(box, outline=(255, 255, 255), width=2)
            else:
                for angle in range(0, 360, 40):
                    draw.arc(box, angle, angle + 20, fill=(255, 255, 255), width=2)
        frames.append(np.asarray(image))
    return np.stack(frames)
