"""Writes a film to its file while it is being made, and tells what drifts in it."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.media.writer import ClipWriter
from jvdit.generation.films import Film, make_film
from jvdit.generation.generator import Generator
from jvdit.generation.results import STATEMENT
from jvdit.generation.settings import Settings

STRETCH = 60.0  # seconds
_PARTS = 4  # of a film that is shorter than two stretches


class Drift:
    """Compares each stretch of a film with the first, while it is being made.

    Args:
        seconds: that the film lasts.
        fps: its frames per second.
    """

    def __init__(self, seconds: float, fps: float):
        self._length = STRETCH if seconds >= 2 * STRETCH else seconds / _PARTS
        self._fps, self._frames = fps, 0
        self._rows: list[np.ndarray] = []  # of a frame: red, green, blue, contrast
        self._power: list[tuple[float, int]] = []
        self._first: tuple[np.ndarray, float] | None = None
        self._stretch = 0

    def add(
        self,
        video: UInt8[np.ndarray, "T H W 3"],
        audio: Float[np.ndarray, "a e"] | None,
        last: bool = False,
    ) -> list[str]:
        """Takes the next frames and samples.

        Returns:
            A line for each stretch that ended with them, but the first.
        """
        if audio is not None and audio.size:
            self._power.append((float(np.square(audio).sum()), audio.size))
        told = []
        for frame in video.astype(np.float32):
            colours = frame.mean((0, 1))
            contrast = frame.mean(-1).std()
            self._rows.append(np.append(colours, contrast))
            self._frames += 1
            end = math.floor((self._stretch + 1) * self._length * self._fps + 0.5)
            if self._frames >= end:
                told += self._closed()
        if last and self._rows:
            told += self._closed()
        return told

    def _closed(self) -> list[str]:
        picture = np.mean(self._rows, axis=0)
        power, count = (sum(x[i] for x in self._power) for i in range(2))
        loud = 10 * math.log10(power / count + 1e-9) if count else math.nan
        self._rows, self._power, self._stretch = [], [], self._stretch + 1
        if self._first is None:
            self._first = picture, loud
            return []
        before, louder = picture - self._first[0], loud - self._first[1]
        start, end = ((self._stretch + i) * self._length for i in (-1, 0))
        red, green, blue, contrast = before / 2.55
        line = (
            f"{start:.0f} to {end:.0f} s against the first {self._length:.0f}: "
            f"red {red:+.1f} %, green {green:+.1f} %, blue {blue:+.1f} %, "
            f"contrast {contrast:+.1f} %"
        )
        return [line if math.isnan(louder) else f"{line}, sound {louder:+.1f} dB"]


def write_film(
    path: str | os.PathLike[str],
    generator: Generator,
    film: Film,
    settings: Settings,
    *,
    metadata: Mapping[str, Any],
    scale: int = 1,
    finish: Callable[[Path], None] | None = None,
    on_frames: Callable[[int], None] = lambda done: None,
    tell: Callable[[str], None] = print,
) -> UInt8[np.ndarray, "k H W 3"]:
    """Makes a film and writes it as an mp4, in constant memory.

    Args:
        path: of the file, which appears whole or not at all.
        generator: of a model that was trained with `extend` or `forcing`.
        film: what to make, complete (`check_film`).
        settings: solver, number of steps, and guidance.
        metadata: JSON values kept in the file.
        scale: side of the square of pixels that each pixel becomes.
        finish: called with the path of the whole file before it appears.
        on_frames: progress callback, called with the frames that are written.
        tell: called with a line about each stretch of time: what has drifted.

    Returns:
        The last frame of each window.
    """
    request, sound = film.request, (0, 0)
    fps = request.frame_rate
    if request.sound:
        vae = generator.model.audio_vae
        sound = vae.channels, vae.sample_rate
    size = request.size[1] * scale, request.size[2] * scale
    drift, stills = Drift(film.frames / fps, fps), []
    told = {"metadata": metadata, "description": STATEMENT}
    with ClipWriter(Path(path), size, fps, sound, **told, finish=finish) as file:
        for piece in make_film(generator, film, settings):
            video = piece.video.repeat(scale, axis=1).repeat(scale, axis=2)
            file.write(video, piece.audio)
            stills.append(piece.video[-1])
            on_frames(piece.done)
            last = piece.done == piece.total
            for line in drift.add(piece.video, piece.audio, last):
                tell(line)
    return np.stack(stills)
