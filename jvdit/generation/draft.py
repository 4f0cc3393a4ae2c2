"""Clips in several passes: an image, the clip that it begins, and then its sound.

A network that was trained with the first frame given (`first_frame`) follows the
motion in a prompt better when it already sees what moves and where (Emu Video,
arXiv:2311.10709, section 3.1). The image comes from the same network, if it was
trained on images beside clips, or from a separate model trained on images alone.

So it is with sound: made for a picture that is there, it is more in step than where
both come out of noise together and neither is sure yet (arXiv:2511.21579, section 3).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip

_OTHER_NOISE = 1 << 31  # XORed into a clip's seed to get the seed of its draft
# Generates clips for requests and yields (index of the request, clip).
Clips = Callable[[Sequence[Request]], Iterator[tuple[int, GeneratedClip]]]


def drafted(
    requests: Sequence[Request], rows: int, paint: Clips, animate: Clips
) -> Iterator[tuple[int, GeneratedClip]]:
    """Generates clips in two passes: the first frame, then the clip that it begins.

    Args:
        requests: complete requests. Those for a single image, or whose first frame is
            given, skip the first pass.
        rows: how many requests go through both passes together before the next group.
        paint: generates the images of the first pass.
        animate: generates the clips of the second pass.

    Yields:
        The index of a request, and its clip.
    """
    for start in range(0, len(requests), rows):
        begun = list(requests[start : start + rows])
        wanted = [i for i, x in enumerate(begun) if _is_open(x)]
        silent: dict[str, Any] = {"frames": 1, "sound": False, "from_sound": None}
        drafts = [
            dataclasses.replace(x, **silent, seed=x.seed ^ _OTHER_NOISE)
            for x in (begun[i] for i in wanted)
        ]
        for i, clip in paint(drafts):
            place = wanted[i]
            begun[place] = dataclasses.replace(begun[place], image=clip.video[0])
        for i, clip in animate(begun):
            yield start + i, clip


def dubbed(
    requests: Sequence[Request], rows: int, show: Clips, dub: Clips
) -> Iterator[tuple[int, GeneratedClip]]:
    """Generates clips in two passes: the picture, and then its sound.

    Args:
        requests: complete requests. Those that are silent, or of which one kind is
            given, are made by the second pass alone.
        rows: how many requests go through both passes together before the next group.
        show: generates the pictures.
        dub: generates the clips.

    Yields:
        The index of a request, and its clip.
    """
    for start in range(0, len(requests), rows):
        begun = list(requests[start : start + rows])
        wanted = [
            i
            for i, x in enumerate(begun)
            if x.sound and x.from_video is None and x.from_sound is None
        ]
        silent = [dataclasses.replace(begun[i], sound=False) for i in wanted]
        for i, clip in show(silent):
            place = wanted[i]
            begun[place] = dataclasses.replace(begun[place], from_video=clip.video)
        for i, clip in dub(begun):
            yield start + i, clip


def _is_open(request: Request) -> bool:
    """Whether nothing is given yet of what is to be seen, but for its subject."""
    given = {*request.given, *["restyle"] * (request.restyle is not None)}
    return request.frames != 1 and given <= {"references", "from_sound"}
