"""Pictures of clips for a page: posters, and previews of clips that are emerging."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def webp(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]],
    milliseconds: float = 125.0,
    side: int = 256,
) -> bytes:
    """Frames as a picture, animated if there are several.

    Args:
        frames: of one size.
        milliseconds: how long each is seen.
        side: smaller ones are enlarged until their short side has so many pixels.
    """
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    scale = max(1.0, side / min(pictures[0].size))
    width, height = (round(n * scale) for n in pictures[0].size)
    pictures = [x.resize((width, height), Image.Resampling.BICUBIC) for x in pictures]
    buffer = io.BytesIO()
    timing = {"duration": round(milliseconds), "loop": 0}
    more = {"save_all": True, "append_images": pictures[1:], **timing}
    pictures[0].save(buffer, "webp", quality=80, method=0, **more)
    return buffer.getvalue()
