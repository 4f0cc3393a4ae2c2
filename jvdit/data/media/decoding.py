"""Decoding of video, frame after frame, within a budget.

FFmpeg can also crash or hang its process, so files that have not been read before
belong into the children of `ingest`. Files are opened through Python file objects and
no protocol is allowed, so that a playlist in disguise cannot make FFmpeg open anything
else. FFmpeg's log level is never touched: setting it can deadlock with decoder threads
on damaged files.
"""

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer

from jvdit.data.media.media_error import MediaError, media_errors

# Titles that aren't UTF-8 are no reason to refuse a file; from PyAV 19 on they aren't.
_READING: dict[str, Any] = {"buffer_size": 2**18}
if int(av.__version__.split(".")[0]) < 19:
    _READING["metadata_errors"] = "ignore"
_CLOSED = {"protocol_whitelist": "data"}
_UNCONVERTED = {10: "BT.2020 of constant luminance", 14: "ICtCp", 15: "IPT"}
Media = str | Path | bytes


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one window may cost.

    Attributes:
        frames: most frames to decode, those before the window included.
        pixels: most pixels of a frame.
        side: least pixels of a frame's height and width.
        seconds: most wall time, checked between frames.
    """

    frames: int = 20_000
    pixels: int = 4096 * 2304
    side: int = 16
    seconds: float | int = 60.0


DEFAULT_BUDGET = Budget()


@contextlib.contextmanager
def open_media(source: Media) -> Iterator[InputContainer]:
    """Opens a file or its bytes for reading."""
    with contextlib.ExitStack() as stack:
        # A TypeError means that this version of PyAV takes other arguments.
        with media_errors("unreadable", TypeError):
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            else:
                file = stack.enter_context(open(source, "rb"))
            container = av.open(file, "r", options=_CLOSED, **_READING)
        yield stack.enter_context(container)


def video_stream(container: InputContainer, budget: Budget) -> tuple[Any, Any]:
    """Returns the main video stream, its decoder set to report damage."""
    stream: Any = container.streams.best("video")
    if stream is None:
        raise MediaError("no_video", container.format.name)
    codec: Any = stream.codec_context
    if codec is None:
        raise MediaError("unsupported", "no decoder for the video stream")
    if codec.width * codec.height > budget.pixels:
        raise MediaError("too_large", f"{codec.width}x{codec.height}")
    if codec.width and min(codec.width, codec.height) < budget.side:
        raise MediaError("too_small", f"{codec.width}x{codec.height}")
    if codec.name == "vp9" and stream.metadata.get("alpha_mode") == "1":
        # FFmpeg's own VP9 decoder drops the alpha plane without a word.
        codec = av.CodecContext.create("libvpx-vp9", "r")
    # Frame threads hide errors, and clips are decoded in parallel anyway.
    codec.thread_count, codec.thread_type = 1, "SLICE"
    codec.options = {"err_detect": "explode"}
    return stream, codec


def _check_frame(frame: av.VideoFrame, first: av.VideoFrame) -> None:
    """Raises MediaError if a decoded frame cannot be used."""
    if frame.is_corrupt:
        raise MediaError("corrupt", f"damaged frame at pts {frame.pts}")
    if frame.interlaced_frame:
        raise MediaError("interlaced")
    if (matrix := _UNCONVERTED.get(int(frame.colorspace))) is not None:
        raise MediaError("hdr", matrix)
    if frame.rotation % 90:
        raise MediaError("corrupt", f"rotated by {frame.rotation} degrees")
    if (frame.height, frame.width) != (first.height, first.width):
        raise MediaError(
            "size_change",
            f"{first.width}x{first.height}, then {frame.width}x{frame.height}",
        )


def decoded_frames(
    container, stream, codec, budget: Budget, deadline: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Decodes (seconds on the container's clock, frame), time increasing."""
    first, last, count = None, -math.inf, 0
    base = stream.time_base
    for packet in container.demux(stream):
        if packet.size == 0 and (packet.pts is not None or packet.dts is not None):
            continue  # Theora's way to repeat a frame; PyAV takes it for the end
        for frame in codec.decode(packet if packet.size else None):
            count += 1
            if count > budget.frames:
                raise MediaError("over_budget", f"{budget.frames} frames")
            if time.monotonic() > deadline:
                raise MediaError("timeout", f"{budget.seconds} s")
            first = frame if first is None else first
            _check_frame(frame, first)
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None:
                stamp = round((count - 1) * frame_period(stream) / base)
            if (seconds := float(stamp * base)) > last:  # a time cannot come twice
                last = seconds
                yield seconds, frame


def frame_period(stream) -> float:
    """Returns the seconds that a frame lasts on average; 1/25 if that is unknown."""
    return 1 / float(stream.average_rate or stream.guessed_rate or 25)
