"""Media files with everything that can be odd about one, made for the tests."""

import io
from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
BT709, BT601 = (0.2126, 0.0722), (0.299, 0.114)


def grey(level, count=1, height=HEIGHT, width=WIDTH):
    return np.full((count, height, width, 3), level, np.uint8)


def numbered(count):
    """Frames of which the brightness says which one it is."""
    return np.concatenate([grey(20 + 4 * k) for k in range(count)])


def numbers(video):
    """Undoes `numbered`."""
    return np.round((video.mean((1, 2, 3)) - 20) / 4).astype(int).tolist()


def mux(
    pictures,
    *,
    times=None,
    fps=24,
    container="mp4",
    codec="libx264",
    pixels="yuv420p",
    options=None,
    rotation=None,
    aspect=None,
    tags=None,
    sound=None,
    sound_start=0.0,
    layout="stereo",
    video_first=0.0,
):
    """Writes a file with everything that can be odd about one; returns its bytes."""
    buffer, base = io.BytesIO(), Fraction(1, 90000)
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width = pictures[0].height, pictures[0].width
        stream.pix_fmt, stream.time_base = pixels, base
        stream.codec_context.time_base = base
        stream.options = options or {}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        track = None
        if sound is not None:
            track = out.add_stream("flac" if container == "matroska" else "aac", 48000)
            track.layout = layout
        for k, picture in enumerate(pictures):
            seconds = video_first + (k / fps if times is None else times[k])
            picture.pts, picture.time_base = round(seconds / base), base
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
        if track is not None:
            form = track.codec_context.format.name
            if layout == "7.1":  # PyAV cannot make planar frames of 8 channels either
                form = "flt"
            for start in range(0, len(sound), 1024):
                block = sound[start : start + 1024]
                if form == "s16":
                    block = (block * 32767).astype(np.int16).reshape(1, -1)
                elif form == "flt":
                    block = block.reshape(1, -1)
                elif form == "fltp":
                    block = np.ascontiguousarray(block.T)
                frame = av.AudioFrame.from_ndarray(block, form, layout)
                frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
                frame.pts = start + round(sound_start * 48000)
                out.mux(track.encode(frame))
            out.mux(track.encode())
    return buffer.getvalue()


def frames_of(video, pixels="rgb24"):
    return [av.VideoFrame.from_ndarray(np.ascontiguousarray(p), pixels) for p in video]


def flat_yuv(rgb, matrix, *, full=False, pixels="yuv420p", height=64, width=64):
    """A frame of one colour, its YUV computed here and not by FFmpeg."""
    r, g, b = (value / 255 for value in rgb)
    kr, kb = matrix
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    if full:
        levels = 255 * y, 128 + 255 * cb, 128 + 255 * cr
    else:
        levels = 16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr
    frame = av.VideoFrame(width, height, pixels)
    for plane, level in zip(frame.planes, levels, strict=True):
        if pixels.endswith("10le"):
            words = np.full(plane.buffer_size // 2, round(level * 4), "<u2")
            plane.update(words.tobytes())
        else:
            plane.update(bytes([round(level)]) * plane.buffer_size)
    return frame


def clicks(times, seconds, rate=48000):
    sound = np.zeros((round(seconds * rate), 2), np.float32)
    for t in times:
        at = round(t * rate)
        sound[at : at + 96] = 0.8 * np.sin(np.arange(96) * np.pi / 8)[:, None]
    return sound
