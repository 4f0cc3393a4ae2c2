"""Clips in two passes: a picture, and then the clip that begins with it.

A network that was trained with its first frame given (`first_frame`) heeds what a
prompt says of motion better where it knows what moves, and where it is (Emu Video,
arXiv:2311.10709, section 3.1). The picture is drawn by the network itself, if it
learned pictures beside clips, or by another one, which learned nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

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


def drafted(
    generator: "Generator",
    requests: Sequence[Request],
    settings: Settings,
    *,
    rows: int,
    watch: Callable[[str, int, int], None],
    **options: Any,
) -> Iterator[tuple[int, np.ndarray]]:
    """Generates clips in two passes, some after others, as `Generator.clips` does.

    Args:
        generator: of the clips; its `pictures`, if it has them, draws the drafts.
        requests: complete ones; those that are a picture, or have a first frame, need
            no draft.
        settings: of both passes.
        rows: how many requests go through both passes before the next ones.
        watch: see there, as for the options.
        **options: see there.

    Yields:
        The number of a request, and its clip.

    Raises:
        ValueError: the model takes no first frame.
    """
    check_draft(generator)
    options["rows"], plain = rows, dataclasses.replace(settings, draft=False)
    painter = generator.pictures or generator
    for start in range(0, len(requests), rows):
        begun = list(requests[start : start + rows])
        wanted = [i for i, x in enumerate(begun) if x.image is None and x.frames != 1]
        drafts = [
            dataclasses.replace(begun[i], frames=1, seed=begun[i].seed ^ _OTHER_NOISE)
            for i in wanted
        ]
        drafting = partial(_told, watch)
        for i, video in painter.clips(drafts, plain, watch=drafting, **options):
            place = wanted[i]
            begun[place] = dataclasses.replace(begun[place], image=video[0])
        for i, video in generator.clips(begun, plain, watch=watch, **options):
            yield start + i, video


def _told(watch: Callable[[str, int, int], None], _: str, done: int, total: int):
    watch("drafting", done, total)
