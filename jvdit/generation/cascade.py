"""Cascades: a clip, then one of twice the rate or size that is made from it.

Each stage (arXiv:2210.02303) is a request to a model that takes `interpolate` or
`upscale`: the same network, or one of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jvdit.generation.generator import Generator
from jvdit.generation.request import FIELDS_GIVEN, SEVERAL, Request
from jvdit.generation.results import GeneratedClip
from jvdit.generation.settings import Settings


def _twice_the_rate(clip: GeneratedClip) -> dict[str, Any]:
    count = 2 * len(clip.video) - 1
    return {"interpolate": clip.video, "frames": count, "fps": 2.0 * clip.fps}


def _twice_the_size(clip: GeneratedClip) -> dict[str, Any]:
    height, width = (2 * side for side in clip.video.shape[1:3])
    return {"upscale": clip.video, "height": height, "width": width}


STAGES: dict[str, Callable[[GeneratedClip], dict[str, Any]]] = {
    "interpolate": _twice_the_rate,
    "upscale": _twice_the_size,
}


def next_request(stage: str, request: Request, clip: GeneratedClip) -> Request:
    """The request of a stage, for a clip that the one before has made.

    Args:
        stage: a name in `STAGES`.
        request: that of the clip.
        clip: which is made better; its sound stays as it is.
    """
    plain = dict.fromkeys(FIELDS_GIVEN) | dict.fromkeys(SEVERAL, ())
    fields = plain | {"sound": False} | STAGES[stage](clip)
    return dataclasses.replace(request, **fields)


def refine(
    generator: Generator,
    stage: str,
    request: Request,
    clip: GeneratedClip,
    settings: Settings = Settings(),  # noqa: B008 - immutable
    **options: Any,
) -> tuple[Request, GeneratedClip]:
    """Makes a clip of twice the rate or size.

    Args:
        generator: of a model that takes what the stage gives.
        stage: a name in `STAGES`.
        request: that of the clip.
        clip: which is made better; its sound stays as it is.
        settings: solver, number of steps, and guidance.
        **options: of `Generator.clips`.

    Returns:
        The request of the new clip, and it.

    Raises:
        ValueError: the model doesn't take what the stage gives.
    """
    wanted = next_request(stage, request, clip)
    settings = dataclasses.replace(settings, draft=False, sound_after=False)
    ((_, found),) = generator.clips([wanted], settings, **options)
    return wanted, found._replace(audio=clip.audio, audio_rate=clip.audio_rate)


def check_stage(generator: Generator, stage: str) -> None:
    """Raises a ValueError if a stage isn't known, or its model doesn't take it."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} must be one of: {', '.join(STAGES)}.")
    generator.model.check_given([stage])
