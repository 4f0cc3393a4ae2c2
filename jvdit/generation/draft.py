"""Clips in several passes: an image, the clip that it begins, and then its sound.

A network that was trained with the first frame given (`first_frame`) follows the
motion in a prompt better when it already sees what moves and where (Emu Video,
arXiv:2311.10709, section 3.1). The image comes from the same network, if it was
trained on images beside clips, or from a separate model trained on images alone.

So it is with sound: made for a picture that is there, it is more in step than where
both come out of noise together and neither is sure yet (arXiv:2511.21579, section 3).
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip

_DRAFT_NOISE = 1 << 31  # XORed into a clip's seed to get the seed of its draft
# Generates clips for requests and yields (index of the request, clip).
Clips = Callable[[Sequence[Request]], Iterator[tuple[int, GeneratedClip]]]


class FirstPass(NamedTuple):
    """A pass that makes a part of a clip, which the second pass is given.

    Attributes:
        asked: what it is to make of a request; None: the request has no need of it.
        joined: the request of the second pass, from that of the clip and what was made.
    """

    asked: Callable[[Request], Request | None]
    joined: Callable[[Request, GeneratedClip], Request]


def _draft(request: Request) -> Request | None:
    """The picture that a clip begins with, unless what is to be seen is given."""
    beside = {"references", "from_sound", "keep_sound"}
    if request.frames == 1 or {*request.given} - beside:
        return None
    silent = {"sound": False, "from_sound": None, "keep_sound": ()}
    seed = request.seed ^ _DRAFT_NOISE
    return dataclasses.replace(request, frames=1, seed=seed, **silent)


def _begun(request: Request, drawn: GeneratedClip) -> Request:
    return dataclasses.replace(request, image=drawn.video[0])


def _silent(request: Request) -> Request | None:
    """The picture of a clip with sound, unless one of the two is given."""
    given = request.from_video is not None or request.from_sound is not None
    if given or not request.sound:
        return None
    return dataclasses.replace(request, sound=False)


def _shown(request: Request, shown: GeneratedClip) -> Request:
    return dataclasses.replace(request, from_video=shown.video)


DRAFTING, SHOWING = FirstPass(_draft, _begun), FirstPass(_silent, _shown)


def in_two_passes(
    first: FirstPass,
    requests: Sequence[Request],
    rows: int,
    prepare: Clips,
    finish: Clips,
) -> Iterator[tuple[int, GeneratedClip]]:
    """Generates a part of clips, and then the clips; such as first frames, or pictures.

    Args:
        first: the first pass.
        requests: complete requests. Those that have no need of it skip it.
        rows: how many requests go through both passes together before the next group.
        prepare: generates what the first pass makes.
        finish: generates the clips.

    Yields:
        The index of a request, and its clip.
    """
    for start in range(0, len(requests), rows):
        group = list(requests[start : start + rows])
        asked = {i: x for i, one in enumerate(group) if (x := first.asked(one))}
        places = [*asked]
        for i, made in prepare([*asked.values()]):
            group[places[i]] = first.joined(group[places[i]], made)
        for i, clip in finish(group):
            yield start + i, clip


def passes(
    request: Request, draft: bool, sound_after: bool
) -> Generator[Request, GeneratedClip, GeneratedClip]:
    """The passes of one clip: yields what to generate, and is sent what came of it.

    Args:
        request: complete.
        draft: whether a picture is drawn first.
        sound_after: whether the picture comes before the sound.

    Returns:
        The clip.
    """
    if sound_after and (silent := _silent(request)):
        shown = yield from passes(silent, draft, False)
        return (yield _shown(request, shown))
    if draft and (picture := _draft(request)):
        request = _begun(request, (yield picture))
    return (yield request)
