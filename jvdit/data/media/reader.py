"""Reading of video: windows of frames and sound, upright, in time and in colour.

Nothing that a file says is believed before it has been decoded: declared lengths,
rates and indices are often wrong, and damaged data often decodes without an error.
FFmpeg can also crash or hang its process, so files that have not been read before
belong into the children of `ingest`. Files are opened through Python file objects and
no protocol is allowed, so that a playlist in disguise cannot make FFmpeg open anything
else. FFmpeg's log level is never touched: setting it can deadlock with decoder threads
on damaged files.
"""

import contextlib
import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import DecoderNotFoundError, FFmpegError
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from jvdit.data.media import tone
from jvdit.data.media.audio import decode_audio

# Titles that aren't UTF-8 are no reason to refuse a file; from PyAV 19 on they aren't.
_LENIENT: dict[str, Any] = (
    {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
)
VIDEOS = frozenset(
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m2t .m2ts .m2v .m4v .mj2 .mkv "
    ".mjpeg .mov .mp4 .mpeg .mpg .mts .mxf .nut .ogm .ogv .qt .rm .rmvb .ts .vob .webm "
    ".wmv .y4m".split()
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
    "hdr": "its colours are coded in a way that can't be converted (ICtCp, …)",
    "size_change": "its picture changes size",
    "low_rate": "its frame rate is so low that too many frames would be repeated",
    "over_budget": "too many frames had to be decoded",
    "timeout": "it took too long",
    "crash": "the decoder died of it",
    "no_caption": "it has no caption",
    "duplicate": "the same file is there under another name",
    "bad_row": "its row of the table, or the caption in it, can't be read",
    "bad_caption": "the caption beside it can't be read",
    "bad_guide": "the guide beside it can't be used",
    "bad_camera": "the camera path beside it can't be used",
    "unlisted": "the table in its folder doesn't name it",
    "other": "it is no video or picture of a kind that is known here",
    "failed": "preparing it failed in a way that was not foreseen",
}
_WIDE = 9  # BT.2020, as AVColorPrimaries and as AVColorSpace
_UNCONVERTED = {10: "BT.2020 of constant luminance", 14: "ICtCp", 15: "IPT"}
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


# What another attempt from the start of the file may mend: a seek can land late, or
# on a frame whose references are missing.
_SEEK_FAULTS = ("corrupt", "short", "unsupported")
_UNTAGGED = (0, 2, 3)  # AVColorSpace RGB (wrong for YUV), UNSPECIFIED, RESERVED
_EPSILON = 1e-4  # seconds; time stamps are rounded to as little as 1/90000 s


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as a viewer would see it.

    Attributes:
        duration: seconds; 0 if unknown.
        fps: average frames per second; 0 if unknown.
        frames: frames declared, or found if the file was scanned; 0 if unknown.
        height, width: pixels, after rotation and with square pixels.
        has_audio: whether there is a sound track, silent or not.
    """

    duration: float
    fps: float
    frames: int
    height: int
    width: int
    has_audio: bool


def _nearest(frames, times, step, period, late) -> Iterator[av.VideoFrame]:
    """Yields for every time, `step` seconds apart, the frame that is nearest to it."""
    k, before = 0, None
    for seconds, frame in frames:
        if before is None and seconds > times[0] + late:
            raise MediaError("short", f"starts {seconds - times[0]:.3f} s late")
        while before and k < len(times):
            if times[k] > (before[0] + seconds) / 2 + _EPSILON:
                break
            yield before[1]
            k += 1
        if k == len(times):
            return
        before = seconds, frame
    if before is None:
        raise MediaError("corrupt", "no frame could be decoded")
    lasts = float((before[1].duration or 0) * (before[1].time_base or 0)) or period
    # The last frame serves while it lasts, and half a step of the result's rate:
    # 17 frames at 8 fps are to be had of 2 s at 24 fps, but not of 2 s at 8 fps.
    reach = max(lasts - _EPSILON, step / 2 + _EPSILON)
    while k < len(times) and times[k] < before[0] + reach:
        yield before[1]
        k += 1
    if k < len(times):
        raise MediaError("short", f"{k} of {len(times)} frames")


class _Converter:
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


def decode_clip(
    source: Media,
    *,
    frames: int,
    fps: float | int,
    height: int,
    width: int,
    start_seconds: float | int = 0.0,
    audio_rate: int = 0,
    channels: int = 2,
    budget: Budget = DEFAULT_BUDGET,
) -> dict[str, Any]:
    """Decodes a window of a video at a given rate and size.

    The picture at window time k / fps is the frame whose time stamp is nearest. It is
    turned upright, scaled (area down, bicubic up) to cover height x width, and
    cropped around its centre.

    Args:
        source: path or content of a file.
        frames: number of frames T.
        fps: frames per second of the result.
        height: pixels of the result.
        width: pixels of the result.
        start_seconds: start of the window, from the start of the video.
        audio_rate: Hz of the sound; 0: no sound.
        channels: 1 or 2: the sound is mixed to mono or stereo.
        budget: what decoding may cost.

    Returns:
        A clip: `video` uint8 [T H W 3], `fps`, `caption` (""), `audio` float32
        [a channels] in [-1, 1] with a = round(T / fps * audio_rate) samples, the first
        one at the time of the first frame, zero where the file has none (None if
        `audio_rate` is 0), `audio_rate`; and `has_audio`: whether there is sound over
        the whole window (and not digital silence), `source`: what was done to it.

    Raises:
        MediaError: the window cannot be had, for one of `REASONS`.
    """
    if channels not in (1, 2):
        raise ValueError(f"`channels` (={channels}) must be 1 or 2.")
    deadline = time.monotonic() + budget.seconds
    times = start_seconds + np.arange(frames) / fps
    window = source, times, 1 / fps, (height, width), budget, deadline
    try:
        video, start, notes = _decode_window(*window, seek=start_seconds > 0)
    except MediaError as e:
        if start_seconds <= 0 or e.reason not in _SEEK_FAULTS:
            raise
        video, start, notes = _decode_window(*window, seek=False)
    clip = {"video": video, "fps": float(fps), "caption": "", "audio": None}
    clip |= {"audio_rate": audio_rate, "has_audio": False, "source": notes}
    if audio_rate:
        size = round(frames / fps * audio_rate), channels
        clip["audio"], state = _sound(source, start, size, audio_rate, deadline)
        clip["has_audio"], notes["audio"] = state == "whole", state
    return clip


def _sound(source, start, size, rate, deadline) -> tuple[np.ndarray, str]:
    """Returns a window's samples, of the given size, and what there was of them."""
    samples, state = np.zeros(size, np.float32), "missing"
    for seek in (True, False) if start > 1 else (False,):
        with open_media(source) as container, media_errors():
            samples, state = decode_audio(
                container, start, size, rate, deadline=deadline, seek=seek
            )
        if state not in ("missing", "corrupt"):
            break
    return samples, state


def _decode_window(
    source, times, step, size, budget, deadline, *, seek
) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Returns (video at `times`, their start on the container's clock, notes)."""
    with open_media(source) as container, media_errors():
        stream, codec = video_stream(container, budget)
        times = times + float((stream.start_time or 0) * stream.time_base)
        period = frame_period(stream)
        if seek:
            offset = math.floor(times[0] / stream.time_base)
            container.seek(offset, stream=stream, backward=True)
        convert = _Converter(size, stream.sample_aspect_ratio)
        video = np.empty((len(times), *size, 3), np.uint8)
        decoded = decoded_frames(container, stream, codec, budget, deadline)
        late = period if seek else max(1.0, period)
        shown, distinct = None, 0
        chosen = _nearest(decoded, times, step, period, late)
        for k, frame in enumerate(chosen):
            if frame is shown:
                video[k] = video[k - 1]
            else:
                video[k], shown = convert(frame), frame
                distinct += 1
        notes = {"distinct_frames": distinct, "source_fps": round(1 / period, 4)}
        return video, float(times[0]), notes | convert.notes


def probe(
    source: Media, *, scan: bool = False, budget: Budget = DEFAULT_BUDGET
) -> MediaInfo:
    """Describes a file, of which at least one frame is decoded.

    Args:
        source: path or content of a file.
        scan: whether to read the whole file to find its true length. Declared lengths
            are wrong in truncated files and with edit lists, and absent in streams.
        budget: what decoding may cost.

    Raises:
        MediaError: no frame can be decoded, for one of `REASONS`.
    """
    deadline = time.monotonic() + budget.seconds
    with open_media(source) as container, media_errors():
        stream, codec = video_stream(container, budget)
        frame = next(decoded_frames(container, stream, codec, budget, deadline), None)
        if frame is None:
            raise MediaError("corrupt", "no frame could be decoded")
        aspect = float(stream.sample_aspect_ratio or 1)
        size = frame[1].height, round(frame[1].width * aspect)
        height, width = size[::-1] if frame[1].rotation % 180 else size
        duration = float((stream.duration or 0) * stream.time_base)
        if not duration and container.duration:
            duration = container.duration / av.time_base
        info = MediaInfo(
            duration=duration,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            frames=stream.frames,
            height=height,
            width=width,
            has_audio=container.streams.best("audio") is not None,
        )
    return _scanned(source, info, budget, deadline) if scan else info


def _scanned(source, info: MediaInfo, budget: Budget, deadline: float) -> MediaInfo:
    """Returns `info` with the length that the packets of the file have."""
    count, end = 0, 0.0
    with open_media(source) as container:
        stream, _ = video_stream(container, budget)
        base = stream.time_base
        period = frame_period(stream)
        start = float((stream.start_time or 0) * base)
        # Where reading fails the file ends: what came before may be good.
        with contextlib.suppress(FFmpegError):
            for packet in container.demux(stream):
                if time.monotonic() > deadline:
                    raise MediaError("timeout", f"{budget.seconds} s")
                if packet.pts is not None and not packet.is_discard:
                    lasts = float((packet.duration or 0) * base) or period
                    count += packet.size > 0
                    end = max(end, float(packet.pts * base) + lasts - start)
    return dataclasses.replace(info, frames=count, duration=end)


def read_metadata(source: Media) -> dict[str, Any]:
    """Returns the metadata that `encode_clip` put into a file; {} if there is none.

    Raises:
        MediaError: the file cannot be opened.
    """
    with open_media(source) as container:
        comment = container.metadata.get("comment", "")
    try:
        found = json.loads(comment)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
