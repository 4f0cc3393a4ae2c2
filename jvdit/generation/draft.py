"""Clips in two passes: a draft, and then the clip anew from the draft's first frame.

A network that was trained with its first frame given (`first_frame`) heeds what a
prompt says of motion better where it knows what moves, and where it is. The draft may
be a picture by another model, which learned nothing but pictures and forgot none of
them over clips (Emu Video, arXiv:2311.10709, section 3.1).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jvdit.generation.conditioning import pictures_of
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.sampling import OnStep

_OTHER_NOISE = 1 << 31  # the seed of a draft is that of its clip, and this


def check_draft(generator: Generator) -> None:
    """Raises ValueError if a model can't go on from a first frame."""
    needs, takes = pictures_of(generator.dit, generator.conventions)
    if needs or "image" not in takes:
        raise ValueError(
            "`draft` needs a model that may, but need not, be given a first frame; "
            "one that is trained with config.first_frame."
        )


def generate(
    generator: Generator,
    requests: Sequence[Request],
    *,
    draft: bool = False,
    on_step: OnStep | None = None,
    **settings: Any,
) -> list[np.ndarray]:
    """Generates clips: uint8 `[T H W 3]` each, in the order of the requests.

    Args:
        generator: of the clips; its `pictures`, if it has them, draws the drafts.
        requests: those that are a picture, or have a first frame, need no draft.
        draft: in two passes, which takes twice as long; else in one.
        on_step: as of `Generator.latents`; counts the steps of both passes.
        **settings: of `Generator.latents`.

    Raises:
        ValueError: the model takes no first frame; see `Generator.latents`, too.
    """
    if not draft:
        return generator(requests, on_step=on_step, **settings)
    check_draft(generator)
    wanted = [i for i, x in enumerate(requests) if x.image is None and x.frames > 1]
    painter, sizes = generator.pictures or generator, {}
    if generator.pictures is not None:
        sizes = {"frames": 1}
    begun = list(requests)
    if wanted:
        drafts = painter(
            [
                dataclasses.replace(
                    requests[i], seed=requests[i].seed ^ _OTHER_NOISE, **sizes
                )
                for i in wanted
            ],
            on_step=on_step and _half(on_step, 0),
            **settings,
        )
        for i, video in zip(wanted, drafts, strict=True):
            begun[i] = dataclasses.replace(requests[i], image=video[0])
    return generator(begun, on_step=on_step and _half(on_step, 1), **settings)


def _half(on_step: OnStep, which: int) -> Callable[[int, int, np.ndarray], None]:
    """What tells `on_step` of one of two passes."""
    return lambda done, total, x: on_step(done + which * total, 2 * total, x)
