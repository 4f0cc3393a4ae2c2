"""Requests made complete: what they leave open, by what is given and by their model."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jvdit.data.clips import SIZE
from jvdit.data.media.audio import read_sound
from jvdit.generation.footage import FOOTAGE, footage_length, footage_shape
from jvdit.generation.request import COARSE, Request

# Of these a clip lasts as long as what is given.
_LASTING = "from_video", "upscale", "interpolate", "restyle", "edges", "guide"
# Defaults for the fields that neither the request nor its model sets.
SUITS = {"negative_prompt": "", "frames": 17, "height": 64, "width": 64, "fps": 8.0}


def complete(
    request: Request, defaults: Mapping[str, Any], unit: int, period: int = 1
) -> Request:
    """Fills the fields that a request leaves open.

    A clip for given footage or sound lasts as long as that.

    Args:
        request: the request.
        defaults: the model's own defaults, by field name.
        unit: height and width are multiples of this, in pixels.
        period: frames are 1 plus a multiple of this.
    """
    suits = SUITS | {k: v for k, v in defaults.items() if k in SUITS}
    open_fields = [name for name in SUITS if getattr(request, name) is None]
    fields = {name: suits[name] for name in open_fields}
    fps = fields.get("fps", request.fps)
    if "frames" in fields and (lasts := _duration(request, fps)):
        fields["frames"] = 1 + max(int(lasts * fps + 0.01) - 1, 0) // period * period
    if {"height", "width"} <= set(open_fields) and (shape := _shape(request)):
        pixels = suits["height"] * suits["width"]
        if request.upscale is not None:
            pixels = math.prod(shape)
        fields["height"], fields["width"] = size_like(shape, pixels, unit)
    return dataclasses.replace(request, **fields)


def _duration(request: Request, fps: float) -> float:
    """Seconds of the footage or sound that is given; 0: none is, or it isn't known."""
    for name in _LASTING:
        if (video := getattr(request, name)) is not None:
            # Pixels are of every so many-th frame of the clip; a file has its rate.
            slower = FOOTAGE[name].slower if isinstance(video, np.ndarray) else 1
            return footage_length(video, name, fps) / fps * slower
    sound = request.from_sound
    if sound is None or isinstance(sound, np.ndarray):
        return 0.0
    return len(read_sound(sound, COARSE)) / COARSE


def _shape(request: Request) -> tuple[int, int] | None:
    """Height and width of the first picture that is given; None: there is none."""
    for name, row in FOOTAGE.items():
        if name != "mask" and (video := getattr(request, name)) is not None:
            height, width = footage_shape(video, name)
            return height * row.smaller, width * row.smaller
    pictures = request.pictures
    return pictures[0].shape[:2] if pictures else None


def size_fields(
    defaults: dict[str, Any], size: str | None, frames: int | None, fps: float | None
) -> dict[str, Any]:
    """Builds the fields of a `Request` that set its size: frames, height, width, fps.

    Args:
        defaults: the model's defaults, used for whatever is None below.
        size: "HEIGHTxWIDTH" in pixels, such as "64x96".
        frames: number of frames.
        fps: frames per second.

    Raises:
        ValueError: `size` isn't of the form HEIGHTxWIDTH.
    """
    names = (*SIZE, "fps")
    given: dict[str, Any] = {"frames": frames, "fps": fps}
    if size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise ValueError(f"`size` (={size!r}) must be HEIGHTxWIDTH, such as 64x96.")
        given |= {"height": int(match[1]), "width": int(match[2])}
    fields = {name: defaults[name] for name in names if name in defaults}
    return fields | {name: value for name, value in given.items() if value is not None}


def size_like(shape: tuple[int, int], pixels: int, unit: int) -> tuple[int, int]:
    """Finds a height and width with an image's aspect ratio and a given area.

    Args:
        shape: height and width of the image.
        pixels: largest height times width.
        unit: both are rounded down to multiples of this, and at least this.
    """
    aspect = shape[0] / shape[1]
    height, width = (pixels * aspect) ** 0.5, (pixels / aspect) ** 0.5
    sides = [max(int(x + 1e-6) // unit, 1) * unit for x in (height, width)]
    return sides[0], sides[1]
