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
        for i, clip in paint([_draft(begun[i]) for i in wanted]):
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
        wanted = [i for i, x in enumerate(begun) if _is_undubbed(x)]
        silent = [dataclasses.replace(begun[i], sound=False) for i in wanted]
        for i, clip in show(silent):
            place = wanted[i]
            begun[place] = dataclasses.replace(begun[place], from_video=clip.video)
        for i, clip in dub(begun):
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
    if sound_after and _is_undubbed(request):
        silent = dataclasses.replace(request, sound=False)
        shown = yield from passes(silent, draft, False)
        return (yield dataclasses.replace(request, from_video=shown.video))
    if draft and _is_open(request):
        drawn = yield _draft(request)
        request = dataclasses.replace(request, image=drawn.video[0])
    return (yield request)


def _draft(request: Request) -> Request:
    """The picture that a clip begins with."""
    return dataclasses.replace(
        request,
        frames=1,
        sound=False,
        from_sound=None,
        keep_sound=(),
        seed=request.seed ^ _OTHER_NOISE,
    )


def _is_undubbed(request: Request) -> bool:
    """Whether neither kind of a clip with sound is given."""
    return bool(
        request.sound and request.from_video is None and request.from_sound is None
    )


def _is_open(request: Request) -> bool:
    """Whether nothing is given yet of what is to be seen, but for its subject."""
    given = {*request.given, *["restyle"] * (request.restyle is not None)}
    return request.frames != 1 and given <= {"references", "from_sound", "keep_sound"}
