"""Decoded frames as RGB of one size: upright, with square pixels, cropped."""

from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from jvdit.data.media import tone

_WIDE = 9  # BT.2020, as AVColorPrimaries and as AVColorSpace
_UNTAGGED = (0, 2, 3)  # AVColorSpace RGB (wrong for YUV), UNSPECIFIED, RESERVED


class Converter:
    """Turns decoded frames into RGB of one size: upright, square pixels, cropped."""

    def __init__(self, size: tuple[int, int], sample_aspect):
        self.size = size
        aspect = float(sample_aspect or 1)
        # Encoders round: 0.999 is meant to be 1, and honouring it costs a rescale.
        self.aspect = 1.0 if abs(aspect - 1) < 0.01 else aspect
        self.reformatter = VideoReformatter()
        self.notes: dict[str, Any] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns a uint8 [H W 3] picture."""
        turn = frame.rotation % 360 // 90
        height, width = self.size if turn % 2 == 0 else self.size[::-1]
        shown_h, shown_w = frame.height, frame.width * self.aspect
        scale = max(height / shown_h, width / shown_w)
        if 0 <= shown_h - height < 2 and 0 <= shown_w - width < 2:
            scale = 1.0  # an odd size that was padded to an even one: crop it
        h = max(height, round(shown_h * scale))
        w = max(width, round(shown_w * scale))
        transparent = any(c.is_alpha for c in frame.format.components)
        # Planar output with this flag is the one form of swscale's that neither is
        # slow nor darkens every picture by one or two levels.
        method = Interpolation.ACCURATE_RND | (
            Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
        )
        hdr = _hdr(frame)
        picture = self.reformatter.reformat(
            frame,
            width=w,
            height=h,
            format="gbrp16le" if hdr else "gbrap" if transparent else "gbrp",
            src_colorspace=_colorspace(frame),
            interpolation=method,
            threads=1,
        ).to_ndarray()
        y, x = (h - height) // 2, (w - width) // 2
        picture = picture[y : y + height, x : x + width]
        if hdr:
            picture = tone.standard(picture, hdr)
        elif transparent:  # shown over black
            alpha = picture[..., 3:].astype(np.uint16)
            picture = ((picture[..., :3] * alpha + 127) // 255).astype(np.uint8)
        self.notes = {
            "source_height": frame.height,
            "source_width": frame.width,
            "rotation": turn * 90,
            "scale": round(scale, 4),
            "cropped": round(1 - height * width / (h * w), 4),
            "transparent": transparent,
        } | ({"hdr": hdr} if hdr else {})
        return np.rot90(picture, turn)


def _hdr(frame: av.VideoFrame) -> str:
    """What `tone.standard` is to undo; "": nothing."""
    wide = tone.WIDE * (_WIDE in (int(frame.color_primaries), int(frame.colorspace)))
    return tone.TRANSFERS.get(int(frame.color_trc), wide)


def _colorspace(frame: av.VideoFrame) -> Colorspace | int | None:
    """Returns the matrix to assume for an untagged frame: by its size, as players do.

    FFmpeg assumes BT.601, which shifts the colours of most HD files.
    """
    if frame.format.is_rgb or int(frame.colorspace) not in _UNTAGGED:
        return None
    if _hdr(frame):
        return _WIDE
    large = frame.height >= 720 or frame.width >= 1280
    return Colorspace.ITU709 if large else Colorspace.ITU601
