"""Steps that reuse what the network's blocks added in the step before (MagCache).

From step to step the sum that the blocks add to their input changes mostly in size,
and how much is a curve of the model that hardly depends on the prompt
(arXiv:2506.09045). So which steps may reuse it is known beforehand.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jvdit.machine.json_files import read_json, write_json

COLLECTION = "reuse"  # of what a network keeps: `residual`, `ratio`, and `skip`


class Memory:
    """What a network keeps from step to step; `advance` carries it.

    Attributes:
        value: a pytree of arrays.
        index: number of the step.
    """

    value: Any
    index: Any


@dataclasses.dataclass(frozen=True)
class Reuse:
    """Which steps reuse, by the curve of a model.

    Attributes:
        ratios: how much larger the blocks' sum is than in the step before, by step, the
            first being 1; of any number of steps.
        threshold: error that may add up before a step is computed anew.
        most: steps in a row that may reuse.
        retention: share of the steps, from the first on, that never do.

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
        """Reads what `save_ratios` wrote."""
        curve = read_json(file, "write it anew with `--calibrate`", cls)
        return dataclasses.replace(curve, threshold=threshold)

    def skips(self, steps: int, first: int = 0) -> tuple[bool, ...]:
        """Which of so many steps reuse.

        Args:
            steps: of the whole solution.
            first: the network's own first step, which has nothing to reuse.
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
    """Writes a measured curve for `Reuse.load`."""
    write_json(file, {"ratios": [round(float(x), 5) for x in ratios]})
