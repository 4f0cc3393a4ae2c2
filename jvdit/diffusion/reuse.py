"""Step reuse (MagCache): some steps skip the blocks and reuse the last residual.

From step to step the residual, the sum that all blocks add to their input, changes
mostly in magnitude, and the ratio of magnitudes is a curve of the model that hardly
depends on the prompt (arXiv:2506.09045). So the steps to skip are known beforehand.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jvdit.machine.json_files import read_json, write_json

COLLECTION = "reuse"  # Flax collection with a network's `residual`, `ratio` and `skip`


class Memory:
    """State that a network keeps from step to step; `advance` carries it along.

    Attributes:
        value: a pytree of arrays.
        index: number of the current step, from 0.
    """

    value: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Reuse:
    """Decides which steps reuse the residual, from a model's measured curve.

    Attributes:
        ratios: for each step, the magnitude of the residual relative to the step
            before; 1 for the first. A curve of any number of steps is resampled.
        threshold: estimated error that may accumulate before a step is computed anew.
        most: most steps in a row that reuse the residual.
        retention: share of the steps, at the start, that are always computed.

    Raises:
        ValueError: there are no ratios, or one is not positive.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    most: int = 3
    retention: float = 0.2

    def __post_init__(self):
        if not self.ratios or not all(x > 0 for x in self.ratios):
            raise ValueError(
                f"`ratios` (={list(self.ratios)[:3]}…) must be positive, one for each "
                "step; measure them with `--calibrate`."
            )

    @classmethod
    def load(cls, file: str | os.PathLike[str], threshold: float = 0.06):
        """Reads a curve that `save_ratios` wrote.

        Args:
            file: the curve's JSON file.
            threshold: estimated error that may accumulate before a step is computed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged.
        """
        curve = read_json(file, "write it anew with `--calibrate`", cls)
        return dataclasses.replace(curve, threshold=threshold)

    def skips(self, steps: int, first: int = 0) -> tuple[bool, ...]:
        """For each step, whether it reuses the residual of the step before.

        Args:
            steps: how many steps the whole solution takes.
            first: the first step of this network, which has nothing to reuse yet.
        """
        known = len(self.ratios)
        places = np.arange(steps) * (known - 1) / max(steps - 1, 1)
        ratios = np.asarray(self.ratios)[np.round(places).astype(int)]
        skips = np.zeros(steps, bool)
        ratio, error, count = 1.0, 0.0, 0
        for i in range(max(int(self.retention * steps + 0.5), 1), steps):
            ratio, count = ratio * ratios[i], count + 1
            error += abs(1 - ratio)
            if error <= self.threshold and count <= self.most:
                skips[i] = True
            else:
                ratio, error, count = 1.0, 0.0, 0
        skips[first] = False
        return tuple(skips.tolist())


def save_ratios(file: str | os.PathLike[str], ratios: Sequence[float]) -> None:
    """Writes a measured curve to a JSON file, for `Reuse.load`."""
    write_json(file, {"ratios": [round(float(x), 5) for x in ratios]})
