"""Cascades: a clip, then one of twice the rate or size that is made from it.

Each stage (arXiv:2210.02303) is a request to a model that takes `interpolate` or
`upscale`: the same network, or one of its own.
"""

import dataclasses
from typing import Any

from jvdit.generation.generator import Generator
from jvdit.generation.request import FIELDS_GIVEN, SEVERAL, Request
from jvdit.generation.results import GeneratedClip
from jvdit.generation.settings import Settings

STAGES = ("interpolate", "upscale")


def next_request(stage: str, request: Request, clip: GeneratedClip) -> Request:
    """The request of a stage, for a clip that the one before has made.

    Args:
        stage: a name in `STAGES`.
        request: that of the clip.
        clip: which is made better; its sound stays as it is.
    """
    plain = dict.fromkeys(FIELDS_GIVEN) | dict.fromkeys(SEVERAL, ())
    frames, height, width = clip.video.shape[:3]
    if stage == "interpolate":
        twice = {"frames": 2 * frames - 1, "fps": 2.0 * clip.fps}
    else:
        twice = {"height": 2 * height, "width": 2 * width}
    fields = plain | {"sound": False, stage: clip.video} | twice
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
