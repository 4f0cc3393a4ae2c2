"""Measuring a model for `Reuse`: how what its blocks add grows from step to step."""

from typing import Any

import numpy as np

from jvdit.diffusion.reuse import Reuse
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request


def calibrate(generator: Generator, request: Request, **settings: Any) -> list[float]:
    """The curve that `Reuse` goes by, measured on a clip.

    Args:
        generator: the model.
        request: the clip.
        **settings: of `Generator.solve`.

    Raises:
        ValueError: see `Generator.solve`.
    """
    measured = generator.stepper.ratios = {}
    generator.latents([request], reuse=Reuse((1.0,), most=0), **settings)
    curve = np.ones(max(last for _, last in measured))
    for (first, last), ratios in measured.items():
        # The first step of a network has none before it.
        curve[first + 1 : last] = ratios[first + 1 : last]
    return curve.tolist()
