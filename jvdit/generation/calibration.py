"""Calibration of step reuse (MagCache): measures a model's curve for `Reuse`."""

from typing import Any

import numpy as np

from jvdit.diffusion.reuse import Reuse
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request


def calibrate(generator: Generator, request: Request, **settings: Any) -> list[float]:
    """Measures a model's magnitude ratios while it generates one clip.

    Args:
        generator: the model to measure.
        request: the clip to generate; the curve hardly depends on its prompt.
        **settings: further arguments of `Generator.solve`, such as `steps`.

    Returns:
        For each step, how much larger the residual of the blocks is than in the step
        before; 1 for the first step of each network.

    Raises:
        ValueError: the model can't generate this size, or a setting is out of range.
    """
    if levels := settings.pop("levels", None):
        generator = generator.timed(tuple(levels))
    measured = generator.stepper.ratios = {}
    generator.latents([request], reuse=Reuse((1.0,), most=0), **settings)
    curve = np.ones(max(last for _, last in measured))
    for (first, last), ratios in measured.items():
        # The first step of a network has no step before it to compare with.
        curve[first + 1 : last] = ratios[first + 1 : last]
    return curve.tolist()
