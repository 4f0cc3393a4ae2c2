"""Clips in two passes: a picture, and then the clip that begins with it.

A network that was trained with its first frame given (`first_frame`) heeds what a
prompt says of motion better where it knows what moves, and where it is (Emu Video,
arXiv:2311.10709, section 3.1). The picture is drawn by the network itself, if it
learned pictures beside clips, or by another one, which learned nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jvdit.generation.request import Request

_OTHER_NOISE = 1 << 31  # the seed of a draft is that of its clip, and this
# Requests to numbers of them, each with its clip.
Clips = Callable[[Sequence[Request]], Iterator[tuple[int, np.ndarray]]]


def drafted(
    requests: Sequence[Request], rows: int, paint: Clips, animate: Clips
) -> Iterator[tuple[int, np.ndarray]]:
    """Generates clips in two passes, some after others.

    Args:
        requests: complete ones; those that are a picture, or have a first frame, need
            no draft.
        rows: how many requests go through both passes before the next ones.
        paint: the first pass.
        animate: the second.

    Yields:
        The number of a request, and its clip.
    """
    for start in range(0, len(requests), rows):
        begun = list(requests[start : start + rows])
        wanted = [i for i, x in enumerate(begun) if x.image is None and x.frames != 1]
        drafts = [
            dataclasses.replace(begun[i], frames=1, seed=begun[i].seed ^ _OTHER_NOISE)
            for i in wanted
        ]
        for i, video in paint(drafts):
            place = wanted[i]
            begun[place] = dataclasses.replace(begun[place], image=video[0])
        for i, video in animate(begun):
            yield start + i, video
