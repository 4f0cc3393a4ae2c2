"""Sizes of clips that an autoencoder and a network's patches divide."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ClipGrid:
    """Which frames, heights and widths a model takes; by default, most models.

    Attributes:
        first: least frames.
        period: frames between one length and the next.
        height, width: multiples, in pixels.
        needs_captions: whether a training can't do without any caption.
    """

    first: int = 1
    period: int = 4
    height: int = 16
    width: int = 16
    needs_captions: bool = False

    def faults(self, frames: int, height: int, width: int) -> list[str]:
        """Says what is wrong with a size, each with the nearest that fits."""
        found = []
        if frames < self.first or (frames - self.first) % self.period:
            below = max(frames - self.first, 0) // self.period
            low = self.first + below * self.period
            near = f"{low} or {low + self.period}" if low < frames else f"{low}"
            found.append(
                f"`frames` (={frames}) must be {self.first} plus a multiple of "
                f"{self.period}; try {near}"
            )
        sides = ("height", height, self.height), ("width", width, self.width)
        for name, size, unit in sides:
            if size % unit:
                near = max(round(size / unit), 1) * unit
                found.append(
                    f"`{name}` (={size}) must be a multiple of {unit}; try {near}"
                )
        return found
