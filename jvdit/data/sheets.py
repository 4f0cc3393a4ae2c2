"""Contact sheets: clips as rows of frames, to be looked at."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jvdit.machine.files import write_atomically

_LEAST = 96  # pixels of a frame's height in a sheet; smaller clips are enlarged
_MOST = 192  # larger ones are reduced
_SOUND = 48  # pixels of the height of a sound
_FONT = 16  # pixels
_GAP = 4  # pixels between frames
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "_ _ _ 3"]],
    captions: Sequence[str] | None = None,
    columns: int = 8,
    sounds: Sequence[UInt8[np.ndarray, "_ _ 3"] | None] | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws one row of evenly spaced RGB frames for each clip, its caption above it.

    Small clips are enlarged by a whole factor, pixel by pixel, so that what is seen
    is what is there; large ones are reduced.

    Args:
        videos: clips, which may differ in size and length.
        captions: a text for each clip, wrapped to the width of the sheet.
        columns: most frames of a row; the first and last frame are always among them.
        sounds: a picture of the sound of each clip, drawn under its frames; None: it
            has none.

    Raises:
        ValueError: there is no clip, or not one caption for each.
    """
    if not videos:
        raise ValueError("A contact sheet needs at least one clip.")
    if captions is not None and len(captions) != len(videos):
        raise ValueError(
            f"`captions` (of {len(captions)}) must be as many as `videos` "
            f"({len(videos)})."
        )
    rows = [_frames(video, columns) for video in videos]
    widths = [_GAP + sum(frame.width + _GAP for frame in row) for row in rows]
    width = max(widths)
    font = ImageFont.load_default(size=_FONT)
    letters = max(12, int((width - 2 * _GAP) / font.getlength("n")))
    texts = [textwrap.wrap(text, letters) for text in captions or [""] * len(rows)]
    heard = sounds or [None] * len(rows)
    blocks = [np.full((_GAP, width, 3), _PAPER, np.uint8)]
    for text, row, wide, sound in zip(texts, rows, widths, heard, strict=True):
        top = (_FONT + 4) * len(text)
        below = top + row[0].height + _GAP
        height = below + _GAP + (0 if sound is None else _SOUND + _GAP)
        block = Image.new("RGB", (width, height), _PAPER)
        for k, line in enumerate(text):
            at = _GAP, k * (_FONT + 4)
            ImageDraw.Draw(block).text(at, line, fill=_INK, font=font)
        for k, frame in enumerate(row):
            block.paste(frame, (_GAP + k * (frame.width + _GAP), top))
        if sound is not None:  # as wide as the frames
            strip = Image.fromarray(sound).resize((wide - 2 * _GAP, _SOUND))
            block.paste(strip, (_GAP, below))
        blocks.append(np.asarray(block))
    return np.concatenate(blocks)


def _frames(video: UInt8[np.ndarray, "T H W 3"], columns: int) -> list[Image.Image]:
    """Returns evenly spaced frames of a clip at a size that can be seen."""
    count, height, width, _ = video.shape
    chosen = np.linspace(0, count - 1, min(columns, count)).round().astype(int)
    factor = -(-_LEAST // height)  # 1 from _LEAST on
    size, method = (width * factor, height * factor), Image.Resampling.NEAREST
    if height > _MOST:
        size = (max(1, round(width * _MOST / height)), _MOST)
        method = Image.Resampling.LANCZOS
    return [Image.fromarray(video[k]).resize(size, method) for k in chosen]


def write_png(path: str | Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a picture, RGB in [0, 255], as a PNG file that is whole or absent."""
    write_atomically(Path(path), png(image))


def png(
    image: UInt8[np.ndarray, "h w 3"], told: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """A picture, RGB in [0, 255], as a PNG file.

    Args:
        image: the picture.
        told: what the file says of itself by PNG's keywords, such as "Description".
    """
    buffer, info = io.BytesIO(), PngInfo()
    for keyword, text in told.items():
        info.add_itxt(keyword, text)
    Image.fromarray(image).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
