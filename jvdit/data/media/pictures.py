"""Pictures, still or animated, as pixels and as films."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, ImageSequence

PICTURES = frozenset(".avif .bmp .jpeg .jpg .png .tif .tiff .webp".split())
_TICK = Fraction(1, 1000)  # seconds: durations are in milliseconds
_SHOWN = 100  # ms of a frame that doesn't say how long


def read_picture(source: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Reads a picture, upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, too large, or none that Pillow knows.
    """
    with _opened(source) as image:
        return np.asarray(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))


def film_of(source: str | os.PathLike[str]) -> bytes:
    """Returns a picture as a lossless video: of one frame, or of its animation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as for `read_picture`.
    """
    buffer = io.BytesIO()
    with _opened(source) as image, av.open(buffer, "w", format="mov") as out:
        mode, pixels = ("RGBA", "rgba") if _transparent(image) else ("RGB", "rgb24")
        stream: Any = out.add_stream("png", rate=25)
        stream.width, stream.height = ImageOps.exif_transpose(image).size
        stream.pix_fmt, stream.time_base = pixels, _TICK
        stream.codec_context.time_base = _TICK
        milliseconds = 0
        for picture in ImageSequence.Iterator(image):
            upright = _eight_bits(ImageOps.exif_transpose(picture)).convert(mode)
            frame = av.VideoFrame.from_ndarray(np.asarray(upright), pixels)
            frame.pts, frame.time_base = milliseconds, _TICK
            lasts = round(picture.info.get("duration") or _SHOWN)
            milliseconds += lasts
            for packet in stream.encode(frame):  # png: one for each frame
                packet.duration = lasts
                out.mux(packet)
    return buffer.getvalue()


def _transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens a picture; whatever Pillow raises becomes an error of one line."""
    try:
        # Pillow only warns of a picture that claims 10^8 pixels, and allots them.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{source} doesn't exist.") from None
    except Exception as error:  # SyntaxError, struct.error, OverflowError were seen
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(source)!r} is no picture: {told}.") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales to 8 bits what has more; Pillow alone clips larger values to 255."""
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image, np.float32)
    most = 65535.0 if image.mode[0] == "I" else 1.0 if values.max() <= 1 else 255.0
    if not (values.min() >= 0 and values.max() <= most):
        raise ValueError(
            f"it has values from {values.min():g} to {values.max():g}; save it with 8 "
            "or 16 bits, or as floats in [0, 1]"
        )
    return Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
