"""Reading of sound: the samples of a window, wherever the file has them."""

import os
import time
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

SILENCE = 1e-4  # peaks below are a muted track, not a quiet scene
GAP = 0.05  # seconds of a window that may lack sound: codecs start a packet late
_WARM_UP = 0.25  # seconds decoded before a window: codecs need a packet or two
_LONGEST = 600.0  # seconds that reading a file's sound may take
_JUMP = 0.1  # seconds that time stamps may be off: Vorbis stamps jitter by a block


def decode_audio(
    container: InputContainer,
    start_seconds: float,
    size: tuple[int, int],
    rate: int,
    *,
    deadline: float,
    seek: bool,
) -> tuple[np.ndarray, str]:
    """Decodes a window of a file's sound.

    Args:
        container: the file, opened anew.
        start_seconds: start of the window on the container's clock.
        size: number of samples a, and channels: 1 or 2.
        rate: Hz of the result.
        deadline: value of `time.monotonic` after which decoding stops.
        seek: whether to start near the window. Not every file can seek in its sound;
            then the window comes back "missing" or "corrupt".

    Returns:
        Samples float32 [a channels] in [-1, 1], zero where there are none, and what
        there is: "whole", "partial", "silent" (digital silence), "corrupt" (zeros) or
        "missing" (zeros).
    """
    samples = np.zeros(size, np.float32)
    stream: Any = container.streams.best("audio")
    if stream is None:
        return samples, "missing"
    try:
        if seek:
            target = max(0.0, start_seconds - _WARM_UP) / stream.time_base
            container.seek(int(target), stream=stream, backward=True)
        covered = _fill(container, stream, samples, start_seconds, rate, deadline)
    except (FFmpegError, ArithmeticError, LookupError, TypeError, ValueError):
        # The picture may well be good: a clip without sound is still a clip.
        return np.zeros_like(samples), "corrupt"
    np.clip(np.nan_to_num(samples, copy=False), -1, 1, out=samples)
    if covered == 0:
        return samples, "missing"
    if np.abs(samples).max() < SILENCE:
        return samples, "silent"
    return samples, "whole" if size[0] - covered <= GAP * rate else "partial"


def read_sound(source: str | os.PathLike[str], rate: int) -> np.ndarray:
    """Reads all of a file's sound.

    Args:
        source: a file of sound, or of a video.
        rate: Hz of the result.

    Returns:
        Samples float32 [a 2] in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no sound, or is damaged.
    """
    if not os.path.exists(source):
        raise FileNotFoundError(f"the sound {source} doesn't exist.")
    deadline, blocks = time.monotonic() + _LONGEST, []
    try:
        with av.open(os.fspath(source)) as container:
            stream: Any = container.streams.best("audio")
            if stream is not None:
                for frame in _resampled(container, stream, rate, 2, deadline):
                    blocks.append(frame.to_ndarray().reshape(-1, 2))
    except (FFmpegError, TimeoutError) as error:
        raise ValueError(f"the sound {source} can't be read: {error}.") from None
    if not blocks:
        raise ValueError(f"{source} has no sound; give a file that has.")
    return np.clip(np.nan_to_num(np.concatenate(blocks)), -1, 1)


def _fill(container, stream, samples, start_seconds, rate, deadline) -> int:
    """Writes a window's samples in place and returns how many there were."""
    count, channels = samples.shape
    position, covered = None, 0
    frame: Any
    for frame in _resampled(container, stream, rate, channels, deadline):
        block = frame.to_ndarray().reshape(-1, channels)
        if frame.pts is not None:
            seconds = float(frame.pts * frame.time_base) - start_seconds
            stamped = round(seconds * rate)
            # Following every stamp would let their rounding cut clicks into it.
            if position is None or stamped - position > _JUMP * rate:
                position = stamped
            elif position - stamped > _JUMP * rate:
                raise ValueError("time stamps advance slower than the samples")
        position = position or 0
        low, high = max(position, 0), min(position + len(block), count)
        if high > low:
            samples[low:high] = block[low - position : high - position]
            covered += high - low
        position += len(block)
        if position >= count:
            break
    return covered


def _resampled(container, stream, rate, channels, deadline):
    """Decodes frames of interleaved float samples at `rate` in 1 or 2 channels."""
    # Mixing down comes before any conversion to numpy: `to_ndarray` of a planar
    # frame of exactly 8 channels is a segmentation fault in PyAV 18.1.
    layout = "mono" if channels == 1 else "stereo"
    resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)
    for frame in container.decode(stream):
        if time.monotonic() > deadline:
            raise TimeoutError("audio")
        yield from resampler.resample(frame)
    yield from resampler.resample(None)
