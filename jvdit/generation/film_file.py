"""Writes a film to its file while it is being made."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jvdit.data.media.writer import ClipWriter
from jvdit.generation.drift import Drift
from jvdit.generation.films import Film, make_film
from jvdit.generation.generator import Generator
from jvdit.generation.results import STATEMENT
from jvdit.generation.settings import Settings


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
