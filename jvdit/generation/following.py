"""What a film follows: footage and a camera path of the whole film, window by window.

They cover the film as it comes out, footage that it begins with included. Each window
is given the part at its own times, the frames of the latents that it carries included,
as training gives a clip what lies beside that clip.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jvdit.data.cameras import CameraPath
from jvdit.generation.footage import footage_length, read_footage
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request

_FOOTAGE = ("edges", "guide")
FOLLOWED = (*_FOOTAGE, "camera")  # fields of a request


def complete_window(generator: Generator, request: Request) -> Request:
    """The request of a film's windows, complete.

    Footage that is given lasts as long as the film, so a window that says nothing of
    its `frames` has as many as the model makes without any.
    """
    if request.frames is None:
        usual = generator.complete(Request("")).frames
        request = dataclasses.replace(request, frames=usual)
    return generator.complete(request)


class Followed:
    """The footage and the camera path that a film follows.

    Args:
        request: of a window, complete; what it gives to follow is of the whole film.
        frames: of the film.

    Raises:
        ValueError: one of them is shorter than the film.
        FileNotFoundError: a file doesn't exist.
    """

    def __init__(self, request: Request, frames: int):
        self._request, self._frames = request, frames
        self._fps = fps = request.frame_rate
        given = [name for name in _FOOTAGE if getattr(request, name) is not None]
        lengths = {x: footage_length(getattr(request, x), x, fps) for x in given}
        self._lengths, self._camera = dict(lengths), request.camera_path
        if self._camera is not None:
            lengths["camera"] = self._camera.covers(fps)
        for name, length in lengths.items():
            if length < frames:
                raise ValueError(
                    f"`{name}` has {length} frames at {fps:g} per second and the film "
                    f"{frames}: it must cover the whole film, footage that this begins "
                    "with included; give more of it, or make a shorter film."
                )

    def window(self, first: int) -> dict[str, Any]:
        """The fields of the request for a window.

        Behind the end of what is given, which the last window may pass, the last frame
        stays.

        Args:
            first: number of the film's frame that is the first of the window.
        """
        size, fields = self._request.size, {}
        for name, length in self._lengths.items():
            there = min(length - first, size[0])
            source, wanted = getattr(self._request, name), (there, *size[1:])
            video = read_footage(source, name, wanted, self._fps, first)
            stay = video[-1:].repeat(size[0] - there, axis=0)
            fields[name] = np.concatenate([video, stay])
        if self._camera is not None:
            start = first / self._fps
            last = (start + (size[0] - 1) / self._fps) * self._camera.fps
            path = _staying(self._camera, math.ceil(last) + 1)
            fields["camera"] = path.window(*size, self._fps, start)
        return fields

    def read_given(self) -> None:
        """Reads all that the film is given, so that damage is found before the work.

        Raises:
            FileNotFoundError: a file doesn't exist.
            ValueError: one is damaged.
        """
        dataclasses.replace(self._request, **self.window(0)).read_given()
        for first in range(self._request.size[0], self._frames, self._request.size[0]):
            self.window(first)


def _staying(path: CameraPath, frames: int) -> CameraPath:
    """A path of at least so many frames, whose camera stays where it is at the end."""
    more = max(frames - len(path.world_to_camera), 0)
    world, inside = (
        np.concatenate([x, x[-1:].repeat(more, axis=0)])
        for x in (path.world_to_camera, path.intrinsics)
    )
    return path._replace(world_to_camera=world, intrinsics=inside)
