"""Writing of video files: H.264 and AAC in mp4, as every player reads them."""

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Mapping
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
    preset: str = "medium",
    metadata: Mapping[str, Any] | None = None,
    **more: Any,
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
        preset: x264's trade of time for size.
        metadata: JSON values kept in the file; see `read_metadata`.
        **more: `description` and `finish`, as of `ClipWriter`.

    Raises:
        ValueError: the arrays are of another shape or type.
    """
    _check(video, fps, audio, audio_rate)
    channels = 0 if audio is None else audio.shape[1]
    how = {"crf": crf, "preset": preset, "metadata": metadata}
    size, sound = video.shape[1:3], (channels, audio_rate)
    with ClipWriter(target, size, fps, sound, **how, **more) as writer:
        writer.write(video, audio)


class ClipWriter:
    """Writes a clip piece by piece, in constant memory; see `encode_clip`.

    Use it as a context: the file appears, whole, when that is left without an error.

    Args:
        target: path, or a buffer.
        size: height and width in pixels.
        fps: frames per second.
        sound: channels, and samples per second; (0, 0): the clip is silent.
        crf, preset, metadata: as of `encode_clip`.
        description: what the file is, in a sentence that players show.
        finish: called with the path of the whole file before it appears at `target`.
    """

    def __init__(
        self,
        target: str | Path | io.BytesIO,
        size: tuple[int, int],
        fps: float | int,
        sound: tuple[int, int] = (0, 0),
        *,
        crf: int = 18,
        preset: str = "medium",
        metadata: Mapping[str, Any] | None = None,
        description: str = "",
        finish: Callable[[Path], None] | None = None,
    ):
        self._stack = contextlib.ExitStack()
        buffer = isinstance(target, io.BytesIO)
        place = contextlib.nullcontext(target) if buffer else replacing(Path(target))
        # The index goes first in files, for the web; a buffer can't be reopened for it.
        options = {} if buffer else {"movflags": "+faststart"}
        file = self._stack.enter_context(place)
        if finish is not None:
            self._stack.push(lambda error, *_: None if error else finish(file))
        container = av.open(file, "w", format="mp4", options=options)
        self._container = self._stack.enter_context(container)
        if description:
            container.metadata["description"] = description
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        self._rate = Fraction(fps).limit_denominator(100_000)
        video = _video_stream(container, size, self._rate, crf, preset)
        streams: list[Any] = [video]
        if sound[0]:  # all streams before any packet
            streams.append(container.add_stream("aac", rate=sound[1]))
            streams[1].layout = "mono" if sound[0] == 1 else "stereo"
            streams[1].bit_rate = 96_000 * sound[0]
        self._streams = streams
        self._waiting: list[av.Packet] = []
        self._samples = np.zeros((0, sound[0]), np.float32)
        self._frames, self._begun, self._sample_rate = 0, 0, sound[1]

    def __enter__(self) -> "ClipWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
            return
        with self._stack:
            self._sound(np.zeros((0, self._samples.shape[1])), last=True)
            for stream in self._streams:
                self._waiting += stream.encode()
            self._mux(self._waiting)

    def write(
        self,
        video: Shaped[np.ndarray, "T H W 3"],
        audio: Float[np.ndarray, "a channels"] | None = None,
    ) -> None:
        """Writes the next frames, and the next samples of the sound, if any."""
        for picture in video:
            frame = _picture(picture)
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            self._frames += 1
            self._waiting += self._streams[0].encode(frame)
        if audio is not None:
            self._sound(audio)
        # Interleaved by time, so that a player need not jump about: what is later than
        # the last of any stream waits.
        last = [
            max((_time(p) for p in self._waiting if p.stream is stream), default=None)
            for stream in self._streams
        ]
        if None not in last:
            ready = [p for p in self._waiting if _time(p) <= min(last)]
            self._waiting = [p for p in self._waiting if _time(p) > min(last)]
            self._mux(ready)

    def _sound(self, audio: np.ndarray, last: bool = False) -> None:
        """Encodes whole frames of the sound, and at the end what is left."""
        self._samples = np.concatenate([self._samples, audio.astype(np.float32)])
        while len(self._samples) >= _AAC_FRAME or (last and len(self._samples)):
            block, self._samples = np.split(self._samples, [_AAC_FRAME])
            planes = np.ascontiguousarray(np.clip(block, -1, 1).T)
            layout = "mono" if len(planes) == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
            frame.sample_rate = self._sample_rate
            frame.pts, frame.time_base = self._begun, Fraction(1, self._sample_rate)
            self._begun += len(block)
            self._waiting += self._streams[1].encode(frame)

    def _mux(self, packets: list[av.Packet]) -> None:
        packets.sort(key=lambda p: (_time(p), p.stream.index))
        self._container.mux(packets)


def _time(packet: Any) -> Fraction:
    return packet.dts * packet.time_base


def _check(video, fps, audio, audio_rate) -> None:
    """Raises ValueError if a clip is not one."""
    shape = [*video.shape]
    if video.dtype != np.uint8 or video.ndim != 4 or shape[-1] != 3:
        raise ValueError(f"`video` must be uint8 [T H W 3], not {video.dtype} {shape}.")
    if 0 in shape:
        raise ValueError(f"`video` {shape} is empty.")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"`fps` (={fps}) must be positive.")
    if audio is not None and (audio.ndim != 2 or audio.shape[1] not in (1, 2)):
        raise ValueError(
            f"`audio` must be [a channels] with 1 or 2 channels, not "
            f"{list(audio.shape)}; pass audio[:, None] if it is mono."
        )
    if audio is not None and audio_rate <= 0:
        raise ValueError(f"`audio_rate` (={audio_rate}) must be given with `audio`.")


def _video_stream(container, size, rate, crf, preset):
    """Adds the video stream: even size, BT.709, short groups of pictures."""
    stream = container.add_stream("libx264", rate=rate)
    stream.height, stream.width = (n + n % 2 for n in size)
    stream.pix_fmt = "yuv420p"
    stream.time_base = 1 / rate
    stream.options = {"crf": str(crf), "preset": preset, **_repeatable()}
    codec = stream.codec_context
    codec.gop_size = max(1, math.floor(rate))  # random access is cheap
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


def _picture(pixels: np.ndarray) -> av.VideoFrame:
    """A frame of even size, in the colours of the file."""
    odd = [*((0, n % 2) for n in pixels.shape[:2]), (0, 0)]
    if any(after for _, after in odd):
        pixels = np.pad(pixels, odd, mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    frame = frame.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
        threads=1,
    )
    frame.colorspace = frame.color_primaries = frame.color_trc = _BT709
    return frame
