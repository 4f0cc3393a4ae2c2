"""What is given of a true clip, so that a model makes the rest: one table.

Each row says which fields of a request it fills from the clip, and which pixels are
known by them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jvdit.data.cameras import CameraPath, Poses
from jvdit.data.conditions.beside import halved
from jvdit.data.world import BESIDE, World

Video = UInt8[np.ndarray, "T H W 3"]
Where = Bool[np.ndarray, "T H W"]


class Truth(NamedTuple):
    """A true clip.

    Attributes:
        video: RGB in [0, 255].
        fps: its frames per second.
        audio: its sound in [-1, 1], if there is any.
        guide: its second video, if there is any.
        camera: the camera of each frame, if that is known.
    """

    video: Video
    fps: float
    audio: Float[np.ndarray, "a e"] | None = None
    guide: Video | None = None
    camera: Poses | None = None


class Giving(NamedTuple):
    """A row of `GIVEN`.

    Attributes:
        fields: of a `Request`, as it takes them.
        where: which pixels of the clip they show.
        reads: what they need of a `Truth` besides its video.
    """

    fields: Callable[[Truth], dict[str, Any]]
    where: Callable[[Video], Where]
    reads: str = ""

    def truths(self, world: World, ids: np.ndarray) -> list[Truth]:
        """Clips of a world, with what is needed of them."""
        beside = {self.reads}.intersection(BESIDE)
        clips = world.clips(ids, audio=self.reads == "audio", beside=beside)
        names = ("video", "audio", *beside)
        found = [{name: clips[name][i] for name in names} for i in range(len(ids))]
        return [Truth(fps=world.fps, **fields) for fields in found]


def _frames(*which: int | slice) -> Callable[[Video], Where]:
    def where(video: Video) -> Where:
        found = np.zeros(video.shape[:3], bool)
        for each in which:
            found[each] = True
        return found

    return where


def _half(video: Video) -> slice:
    """The first half of the frames and one, which are whole latents."""
    return slice(0, 1 + (len(video) - 1) // 4 * 2)


def _middle(video: Video) -> Where:
    """A box of half the height and width in the middle."""
    _, height, width = video.shape[:3]
    found = np.zeros(video.shape[:3], bool)
    inside = slice(height // 4, height - height // 4)
    found[:, inside, width // 4 : width - width // 4] = True
    return found


def _masked(video: Video, kept: Where) -> dict[str, Any]:
    mask = np.where(kept[..., None], 0, 255).astype(np.uint8).repeat(3, -1)
    return {"video": video, "mask": mask}


_NOTHING, _ALL = _frames(), _frames(slice(None))
GIVEN: dict[str, Giving] = {
    "nothing": Giving(lambda x: {}, _NOTHING),
    "first": Giving(lambda x: {"image": x.video[0]}, _frames(0)),
    "both_ends": Giving(
        lambda x: {"image": x.video[0], "last_image": x.video[-1]}, _frames(0, -1)
    ),
    "prefix": Giving(
        lambda x: {"prefix": x.video[_half(x.video)]},
        lambda video: _frames(_half(video))(video),
    ),
    "suffix": Giving(lambda x: {"suffix": x.video[-3:]}, _frames(slice(-3, None))),
    "keyframes": Giving(
        lambda x: {
            "keyframes": tuple((i / x.fps, x.video[i]) for i in (0, len(x.video) // 2))
        },
        lambda video: _frames(0, len(video) // 2)(video),
    ),
    "reference": Giving(
        lambda x: {"references": (x.video[len(x.video) // 2],)}, _NOTHING
    ),
    "inpaint": Giving(
        lambda x: _masked(x.video, ~_middle(x.video)), lambda video: ~_middle(video)
    ),
    "outpaint": Giving(lambda x: _masked(x.video, _middle(x.video)), _middle),
    "interpolate": Giving(
        lambda x: {"interpolate": x.video[::2]}, _frames(slice(None, None, 2))
    ),
    "upscale": Giving(lambda x: {"upscale": halved(x.video)}, _ALL),
    "edges": Giving(lambda x: {"edges": x.video}, _NOTHING),
    "guide": Giving(lambda x: {"guide": x.guide}, _NOTHING, "guide"),
    "camera": Giving(
        lambda x: {"camera": CameraPath.of(x.camera, *x.video.shape[1:3], x.fps)},
        _NOTHING,
        "camera",
    ),
    "picture": Giving(lambda x: {"from_video": x.video}, _ALL),
    "sound": Giving(lambda x: {"from_sound": x.audio}, _NOTHING, "audio"),
    "inpaint_sound": Giving(  # all but the second half
        lambda x: {
            "from_sound": x.audio,
            "keep_sound": ((0.0, len(x.video) / x.fps / 2),),
        },
        _NOTHING,
        "audio",
    ),
}
