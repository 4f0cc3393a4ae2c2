"""Reading of video: windows of frames and sound, upright, in time and in colour.

Nothing that a file says is believed before it has been decoded: declared lengths,
rates and indices are often wrong, and damaged data often decodes without an error.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from jvdit.data.media.audio import decode_audio
from jvdit.data.media.conversion import Converter
from jvdit.data.media.decoding import (
    DEFAULT_BUDGET,
    Budget,
    Media,
    decoded_frames,
    frame_period,
    open_media,
    video_stream,
)
from jvdit.data.media.media_error import MediaError, media_errors

VIDEOS = frozenset(
    ".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m2t .m2ts .m2v .m4v .mj2 .mkv "
    ".mjpeg .mov .mp4 .mpeg .mpg .mts .mxf .nut .ogm .ogv .qt .rm .rmvb .ts .vob .webm "
    ".wmv .y4m".split()
)
# What another attempt from the start of the file may mend: a seek can land late, or
# on a frame whose references are missing.
_SEEK_FAULTS = ("corrupt", "short", "unsupported")
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
        sound = start, (round(frames / fps * audio_rate), channels), audio_rate
        state = "missing"
        for seek in (True, False) if start > 1 else (False,):
            if state in ("missing", "corrupt"):
                with open_media(source) as container, media_errors():
                    clip["audio"], state = decode_audio(
                        container, *sound, deadline=deadline, seek=seek
                    )
        clip["has_audio"], notes["audio"] = state == "whole", state
    return clip


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
        convert = Converter(size, stream.sample_aspect_ratio)
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
