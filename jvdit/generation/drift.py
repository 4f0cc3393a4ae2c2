"""What drifts in a film, from one stretch of time to the next, in plain measures."""

import math

import numpy as np
from jaxtyping import Float, UInt8

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
