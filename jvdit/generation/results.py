"""What a generator gives back: latents, and clips with or without sound."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.data.media.writer import encode_clip
from jvdit.data.spectrum import spectrogram
from jvdit.evaluation.oracle.sound import onsets

_WATCHED = 256  # pixels of the short side, as many as are seen well


class Latents(NamedTuple):
    """Normalised latents of a clip.

    Attributes:
        picture: of its picture.
        sound: of its sound; None: it is silent.
    """

    picture: Float[np.ndarray, "f h w c"]
    sound: Float[np.ndarray, "n e"] | None = None


class GeneratedClip(NamedTuple):
    """A generated clip.

    Attributes:
        video: RGB pixels in [0, 255].
        fps: frames per second.
        audio: samples in [-1, 1], of which the first sounds with the first frame; None:
            the clip is silent.
        audio_rate: samples per second; 0: the clip is silent.
    """

    video: UInt8[np.ndarray, "T H W 3"]
    fps: float
    audio: Float[np.ndarray, "a e"] | None = None
    audio_rate: int = 0

    @property
    def spectrogram(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """A picture of the sound, with a mark where each sets in; None: silent."""
        if self.audio is None:
            return None
        marks = onsets(self.audio.mean(1)[None], self.audio_rate)[0]
        return spectrogram(self.audio, self.audio_rate, width=512, marks=marks)

    @property
    def viewing_scale(self) -> int:
        """How many times to enlarge the clip so that its short side has 256 pixels."""
        return viewing_scale(self.video.shape[1:3])

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        scale: int = 1,
    ) -> None:
        """Writes the clip as an mp4 file: H.264, and AAC if it has sound.

        Args:
            path: of the file, which appears whole or not at all.
            metadata: JSON values kept in the file.
            scale: side of the square of pixels that each pixel becomes.
        """
        sound = {"audio": self.audio, "audio_rate": self.audio_rate}
        video = self.video.repeat(scale, axis=1).repeat(scale, axis=2)
        encode_clip(Path(path), video, self.fps, metadata=metadata, **sound)


def viewing_scale(size: tuple[int, int]) -> int:
    """How many times to enlarge a clip so that its short side has 256 pixels.

    Args:
        size: its height and width.
    """
    return max(1, -(-_WATCHED // min(size)))
