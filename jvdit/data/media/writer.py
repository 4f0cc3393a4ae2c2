"""Writing of video files: H.264 and AAC in mp4, as every player reads them."""

import contextlib
import functools
import io
import json
import math
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from jaxtyping import Float, Shaped

from jvdit.machine.files import replacing

_BT709 = 1  # AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic alike
_AAC_FRAME = 1024  # samples
PRESETS = "ultrafast superfast veryfast faster fast medium slow slower veryslow".split()
PRESETS.append("placebo")


def encode_clip(
    target: str | Path | io.BytesIO,
    video: Shaped[np.ndarray, "T H W 3"],
    fps: float | int,
    *,
    audio: Float[np.ndarray, "a channels"] | None = None,
    audio_rate: int = 0,
    crf: int = 18,
    gop: int | None = None,
    preset: str = "medium",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a clip as an mp4 file: H.264 yuv420p tagged BT.709, AAC.

    4:2:0 needs even sizes, so the last row or column of an odd one is written twice.
    AAC's encoder starts 1024 samples before the first one; its packets keep their
    negative time stamps, of which the file gets an edit list, so that readers that
    honour it (FFmpeg, browsers) play the sound exactly in time. The same input gives
    the same bytes.

    Args:
        target: path, which appears whole or not at all, or a buffer.
        video: uint8 [T H W 3].
        fps: frames per second.
        audio: float32 [a channels] in [-1, 1] with 1 or 2 channels, or None.
        audio_rate: Hz of `audio`.
        crf: x264's quality: 0 is lossless in 4:2:0, 18 looks it, 28 is coarse.
        gop: most frames between key frames; None: one second of them. A short one makes
            random access cheap.
        preset: x264's trade of time for size.
        metadata: JSON values kept in the file; see `read_metadata`.

    Raises:
        ValueError: the arrays are of another shape or type.
    """
    _check(video, fps, audio, audio_rate)
    buffer = isinstance(target, io.BytesIO)
    place = contextlib.nullcontext(target) if buffer else replacing(Path(target))
    # The index goes first in files, for the web; a buffer cannot be reopened for it.
    options = {} if buffer else {"movflags": "+faststart"}
    with place as file, av.open(file, "w", format="mp4", options=options) as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        rate = Fraction(fps).limit_denominator(100_000)
        picture = _video_stream(container, video, rate, crf, gop, preset)
        if audio is not None:  # all streams before any packet
            sound: Any = container.add_stream("aac", rate=audio_rate)
            sound.layout = "mono" if audio.shape[1] == 1 else "stereo"
            sound.bit_rate = 96_000 * audio.shape[1]
        packets: list[Any] = _video_packets(picture, video, rate)
        if audio is not None:
            packets += _audio_packets(sound, audio, audio_rate)
        # Interleaved by time, so that a player need not jump about.
        packets.sort(key=lambda p: (p.dts * p.time_base, p.stream.index))
        container.mux(packets)


def _check(video, fps, audio, audio_rate) -> None:
    """Raises ValueError if a clip is not one."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"`video` must be uint8 [T H W 3], not {video.dtype} {list(video.shape)}."
        )
    if 0 in video.shape:
        raise ValueError(f"`video` {list(video.shape)} is empty.")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` (={fps}) must be positive.")
    if audio is not None and (audio.ndim != 2 or audio.shape[1] not in (1, 2)):
        raise ValueError(
            f"`audio` must be [a channels] with 1 or 2 channels, not "
            f"{list(audio.shape)}; pass audio[:, None] if it is mono."
        )
    if audio is not None and audio_rate <= 0:
        raise ValueError(f"`audio_rate` (={audio_rate}) must be given with `audio`.")


def _video_stream(container, video, rate, crf, gop, preset):
    """Adds the video stream: even size, BT.709, short groups of pictures."""
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = (n + n % 2 for n in video.shape[1:3])
    stream.pix_fmt = "yuv420p"
    stream.time_base = 1 / rate
    stream.options = {"crf": str(crf), "preset": preset, **_repeatable()}
    codec = stream.codec_context
    codec.gop_size = gop or max(1, math.floor(rate))
    codec.thread_count = 1
    codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
    codec.color_range = ColorRange.MPEG
    return stream


@functools.cache
def _repeatable() -> dict[str, str]:
    """Options with which x264 gives the same bytes again.

    Its AVX-512 code for mbtree depends on what was in memory before, at widths that
    aren't multiples of 128 pixels (seen in x264 165: 16 of 480 clips of 64 x 96).
    """
    file = Path("/proc/cpuinfo")
    wide = file.exists() and "avx512" in file.read_text(errors="ignore")
    return {"x264-params": "asm=avx2"} if wide else {}


def _video_packets(stream, video, rate) -> list[av.Packet]:
    odd = [(0, 0), *((0, n % 2) for n in video.shape[1:3]), (0, 0)]
    if any(after for _, after in odd):
        video = np.pad(video, odd, mode="edge")
    packets = []
    for k, picture in enumerate(video):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        frame = frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
            threads=1,
        )
        frame.colorspace = frame.color_primaries = frame.color_trc = _BT709
        frame.pts, frame.time_base = k, 1 / rate
        packets += stream.encode(frame)
    return packets + stream.encode()


def _audio_packets(stream, audio, rate) -> list[av.Packet]:
    planes = np.clip(audio, -1, 1).astype(np.float32).T
    layout = "mono" if len(planes) == 1 else "stereo"
    packets = []
    for start in range(0, planes.shape[1], _AAC_FRAME):
        block = np.ascontiguousarray(planes[:, start : start + _AAC_FRAME])
        frame = av.AudioFrame.from_ndarray(block, "fltp", layout)
        frame.sample_rate = rate
        frame.pts, frame.time_base = start, Fraction(1, rate)
        packets += stream.encode(frame)
    return packets + stream.encode()
