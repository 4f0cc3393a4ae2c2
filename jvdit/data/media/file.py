"""Opening of video files and decoding of their frames, nothing taken on trust.

Files are opened through Python file objects and no protocol is allowed, so that a
playlist in disguise cannot make FFmpeg open anything else. FFmpeg's log level is
never touched: setting it can deadlock with decoder threads on damaged files.
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
from av.error import DecoderNotFoundError, FFmpegError

# Titles that aren't UTF-8 are no reason to refuse a file; from PyAV 19 on they aren't.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)
REASONS = {
    "missing": "there is no such file",
    "unreadable": "not a media file, or its header is damaged",
    "no_video": "it has no video stream",
    "unsupported": "this build of FFmpeg cannot decode its codec or convert its pixels",
    "corrupt": "damaged, encrypted or incomplete: it does not decode cleanly",
    "short": "it ends before the window does",
    "too_small": "its picture is too small",
    "too_large": "its picture is too large",
    "interlaced": "it is interlaced",
    "hdr": "it is HDR or of wide gamut (PQ, HLG, BT.2020)",
    "size_change": "its picture changes size",
    "low_rate": "its frame rate is so low that too many frames would be repeated",
    "over_budget": "too many frames had to be decoded",
    "timeout": "it took too long",
    "crash": "the decoder died of it",
    "no_caption": "it has no caption",
    "duplicate": "the same file is there under another name",
    "failed": "preparing it failed in a way that was not foreseen",
}
_TRANSFER_HDR = {16: "PQ", 18: "HLG"}
_WIDE = (9, 10)  # BT.2020 as AVColorPrimaries and AVColorSpace, and its cousins
Media = str | Path | bytes


class MediaError(ValueError):
    """A file, or a window of it, that cannot be used.

    Args:
        reason: one of `REASONS`.
        detail: what was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is none of {sorted(REASONS)}.")
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail or REASONS[self.reason]}"


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
def media_errors(reason: str = "corrupt", *passing: type[Exception]) -> Iterator[None]:
    """Turns whatever a damaged file makes FFmpeg or PyAV raise into a MediaError.

    Args:
        reason: one of `REASONS`, where the error tells none.
        passing: errors that aren't the file's fault.
    """
    try:
        yield
    except (MediaError, MemoryError, *passing):
        raise
    except FileNotFoundError as e:
        raise MediaError("missing", str(e.filename)) from None
    except TimeoutError as e:  # of sound, where a MediaError would mean that it is bad
        raise MediaError("timeout", str(e)) from None
    except (DecoderNotFoundError, NotImplementedError) as e:
        raise MediaError("unsupported", str(e)) from None
    except FFmpegError as e:
        raise MediaError(reason, str(e.strerror)) from None
    except Exception as e:  # AttributeError, IndexError, UnicodeDecodeError were seen
        raise MediaError(reason, f"{type(e).__name__}: {e}"[:200]) from None


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
            container = av.open(
                file,
                "r",
                **_LENIENT,
                buffer_size=2**18,
                options={"protocol_whitelist": "data"},
            )
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
    if (transfer := _TRANSFER_HDR.get(int(frame.color_trc))) is not None:
        raise MediaError("hdr", transfer)
    if int(frame.color_primaries) in _WIDE or int(frame.colorspace) in _WIDE:
        raise MediaError("hdr", "BT.2020")
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
