"""Clips in two passes: a draft, and then the clip anew from the draft's first frame.

A network that was trained with its first frame given (`first_frame`) heeds what a
prompt says of motion better where it knows what moves, and where it is. The draft may
be a picture by another model, which learned nothing but pictures and forgot none of
them over clips (Emu Video, arXiv:2311.10709, section 3.1).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jvdit.generation.conditioning import pictures_of
from jvdit.generation.request import Request
from jvdit.generation.settings import Settings

if TYPE_CHECKING:
    from jvdit.generation.generator import Generator

_OTHER_NOISE = 1 << 31  # the seed of a draft is that of its clip, and this


def check_draft(generator: "Generator") -> None:
    """Raises ValueError if a model can't go on from a first frame."""
    needs, takes = pictures_of(generator.dit, generator.conventions)
    if needs or "image" not in takes:
        raise ValueError(
            "`draft` needs a model that may, but need not, be given a first frame; "
            "one that is trained with config.first_frame."
        )


def with_first_frames(
    generator: "Generator",
    requests: Sequence[Request],
    settings: Settings,
    **options: Any,
) -> list[Request]:
    """The requests, each with a first frame that the model draws for it.

    Args:
        generator: of the clips; its `pictures`, if it has them, draws the drafts.
        requests: complete ones; those that are a picture, or have a first frame, need
            no draft.
        settings: of the drafts.
        **options: of `Generator.clips`.
    """
    begun = list(requests)
    wanted = [i for i, x in enumerate(requests) if x.image is None and x.frames != 1]
    painter, sizes = generator.pictures or generator, {}
    if generator.pictures is not None:
        sizes = {"frames": 1}
    drafts = [
        dataclasses.replace(requests[i], seed=requests[i].seed ^ _OTHER_NOISE, **sizes)
        for i in wanted
    ]
    plain = dataclasses.replace(settings, draft=False)
    for number, video in painter.clips(drafts, plain, **options):
        i = wanted[number]
        begun[i] = dataclasses.replace(requests[i], image=video[0])
    return begun
