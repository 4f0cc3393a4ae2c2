"""Reads the pictures and the footage that requests give, as their clips need them."""

import contextlib
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jvdit.data.clips import SIZE
from jvdit.data.media.pictures import read_picture
from jvdit.data.media.reader import decode_clip, probe

# A file path, or pixels: uint8 [H W 3], or [T H W 3] for a video.
Pictures = str | os.PathLike[str] | np.ndarray

_SMOOTH = Image.Resampling.LANCZOS
# Mean and standard deviation of each colour channel in [0, 1] that CLIP was trained on.
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Footage(NamedTuple):
    """What of a clip a field of footage is.

    Attributes:
        whole: it lasts as long as the clip; else it is shorter.
        slower: it has every so many-th frame of the clip.
        smaller: its sides are so many times shorter.
    """

    whole: bool = True
    slower: int = 1
    smaller: int = 1


# Of the fields of a `Request`.
FOOTAGE = {
    "video": Footage(),
    "mask": Footage(),
    "from_video": Footage(),
    "prefix": Footage(whole=False),
    "suffix": Footage(whole=False),
    "interpolate": Footage(slower=2),
    "upscale": Footage(smaller=2),
    "restyle": Footage(),
    "edges": Footage(),
    "guide": Footage(),
}


def read_footage(
    source: Pictures, name: str, size: tuple[int, int, int], fps: float, first: int = 0
) -> UInt8[np.ndarray, "T H W 3"]:
    """Reads footage for a clip, scaled to cover its size and cropped.

    Args:
        source: the file, or pixels at the rate at which they are needed.
        name: a row of `FOOTAGE`, which says of what rate, size and length.
        size: frames, height and width of the clip.
        fps: frames per second of the clip.
        first: frame of the footage, at its rate here, with which to begin.

    Raises:
        ValueError: its length or size doesn't go with the clip's.
        FileNotFoundError: the file doesn't exist.
    """
    row, (frames, height, width) = FOOTAGE[name], size
    if (frames - 1) % row.slower or height % row.smaller or width % row.smaller:
        raise ValueError(
            f"`{name}` needs a clip of {row.slower} n + 1 frames and sides that "
            f"{row.smaller} divides, not {frames}x{height}x{width}."
        )
    length = 1 + (frames - 1) // row.slower
    if not row.whole:
        length = footage_length(source, name, fps)
        if length >= frames:
            raise ValueError(
                f"`{name}` has {length} frames and the clip {frames}: ask for more "
                "`frames`, or give less of it."
            )
    sides = height // row.smaller, width // row.smaller
    if name == "mask" and (still := _still(source)) is not None:
        return np.repeat(resized(still, sides, ImageOps.fit)[None], length, axis=0)
    if not isinstance(source, np.ndarray):
        wanted = dict(zip(SIZE, (length, *sides), strict=True))
        rate = fps / row.slower
        window = {"fps": rate, "start_seconds": first / rate, **wanted}
        return decode_clip(existing(source, name), **window)["video"]
    _check(source, 4, name)
    source = source[first:]
    if len(source) < length:
        raise ValueError(
            f"`{name}` has {len(source)} frames and the clip needs {length}; give at "
            "least as many, or ask for fewer."
        )
    return np.stack([resized(x, sides, ImageOps.fit) for x in source[:length]])


def _still(source: Pictures) -> np.ndarray | None:
    """A picture, for all frames; None: it's a video."""
    if isinstance(source, np.ndarray):
        return source if source.ndim == 3 else None
    with contextlib.suppress(OSError, ValueError):
        return read_picture(source)
    return None


def footage_length(source: Pictures, name: str, fps: float) -> int:
    """How many frames footage has at a frame rate."""
    if isinstance(source, np.ndarray):
        return len(source)
    lasts = probe(existing(source, name), scan=True).duration
    return max(int(lasts * fps + 0.01), 1)


def footage_shape(source: Pictures, name: str) -> tuple[int, int]:
    """Height and width of footage."""
    if isinstance(source, np.ndarray):
        return source.shape[-3], source.shape[-2]
    info = probe(existing(source, name))
    return info.height, info.width


def resized(
    picture: np.ndarray, size: tuple[int, int], way: Any, **options: Any
) -> np.ndarray:
    """An image at a height and width, by a function of `ImageOps`."""
    if picture.shape[:2] == size:
        return picture
    image = Image.fromarray(picture)
    return np.asarray(way(image, size[::-1], _SMOOTH, **options))


def existing(source: str | os.PathLike[str], name: str) -> str:
    """The path of a file; raises FileNotFoundError if there is none."""
    if not pathlib.Path(source).exists():
        raise FileNotFoundError(f"`{name}` (={source}) doesn't exist.")
    return os.fspath(source)


def for_encoder(
    picture: UInt8[np.ndarray, "H W 3"], side: int
) -> Float[np.ndarray, "S S 3"]:
    """Preprocesses an image for CLIP, as transformers' CLIPImageProcessor does.

    Resizes the shorter side to `side`, center-crops to a square, and normalises each
    colour channel. (diffusers does the same; Wan's own code squeezes the whole image
    into the square instead.)
    """
    height, width = picture.shape[:2]
    size = [side * n // min(height, width) for n in (width, height)]
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = ((x - side) // 2 for x in size)
    square = np.asarray(image, np.float32)[top : top + side, left : left + side] / 255
    return (square - _CLIP_MEAN) / _CLIP_STD


def read_still(source: Pictures, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """Reads a picture; errors name the field."""
    if isinstance(source, np.ndarray):
        _check(source, 3, name)
        return source
    try:
        return read_picture(source)
    except (OSError, ValueError) as error:
        raise type(error)(f"`{name}` (={source}): {error}") from None


def _check(pixels: np.ndarray, ndim: int, name: str) -> None:
    if pixels.ndim != ndim or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        wanted = "[T H W 3]" if ndim == 4 else "[H W 3]"
        raise ValueError(
            f"`{name}` is {pixels.dtype} {list(pixels.shape)}; give uint8 {wanted}."
        )
