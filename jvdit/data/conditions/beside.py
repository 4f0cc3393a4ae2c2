"""Conditions that are encoded by themselves: tokens beside the clip, or channels.

A causal autoencoder codes a frame from those before it, so neither a later frame nor a
lower rate or size of a clip has latents among the clip's own. Each is encoded by itself
and lies, clean, at the positions where it belongs.

A data set of latents keeps such views of its clips (`VIEWS`); training takes from them
what a request would give.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from jvdit.data.cameras import RAY, plucker_rays
from jvdit.data.conditions.known import Asked, Known, Part, Place, to_pixels
from jvdit.data.order import stable_hash
from jvdit.data.patches import Size, latent_times

MOST_STILLS = 3  # that training gives of a clip
_REFERENCE = -1.0  # seconds of the first reference; the others come before it


# Views


class View(NamedTuple):
    """A row of `VIEWS`.

    Attributes:
        clips: the clips `[k T H W 3]` to encode, of a clip's pixels; None: nothing is
            encoded.
        size: latent frames, height and width of the view, all of its clips one after
            another, by those of the clip and the pixel frames of a latent frame; None:
            such a clip has no such view.
        times: seconds of each latent frame, by how many there are, frames per second
            of the clip, and pixel frames of a latent frame.
        cell: side of its cells, in cells of the clip.
        of: what of a clip of pixels it is made of, see `Source.read`: its `video`, or
            what lies beside it, which some clips may lack.
        measured: its channels `[f h w u]` of what it is made of, in the place of
            latents; by the size of the clip's latents and the pixel frames of one.
        per_frame: channels that those have of each pixel frame.
    """

    clips: (
        Callable[[UInt8[np.ndarray, "T H W 3"]], UInt8[np.ndarray, "k _T _H _W 3"]]
        | None
    )
    size: Callable[[Size, int], Size | None]
    times: Callable[[int, float, int], Float[np.ndarray, "f"]]
    cell: int = 1
    of: str = "video"
    measured: Callable[[np.ndarray, Size, int], np.ndarray] | None = None
    per_frame: int = 0

    def width(self, latent_channels: int, compression: int) -> int:
        """Its channels, by those of latents and the pixel frames of a latent frame."""
        return self.per_frame * compression if self.measured else latent_channels


def _stills(size: Size, compression: int) -> Size | None:
    return (1 + (size[0] - 1) * compression, *size[1:]) if size[0] > 1 else None


def _slow(size: Size, compression: int) -> Size | None:
    odd = (size[0] - 1) % 2
    return (1 + (size[0] - 1) // 2, *size[1:]) if size[0] > 1 and not odd else None


def _small(size: Size, compression: int) -> Size | None:
    f, h, w = size
    return None if h % 2 or w % 2 else (f, h // 2, w // 2)


def halved(video: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T _H _W 3"]:
    """The video at half its size: the mean of every 2 x 2 pixels."""
    t, h, w, _ = video.shape
    cells = video.reshape(t, h // 2, 2, w // 2, 2, 3)
    return np.round(cells.mean((2, 4), dtype=np.float32)).astype(np.uint8)


def edges(video: UInt8[np.ndarray, "T H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Where brightness changes, white on black, whichever way and whatever its colour.

    Each colour's gradient, by central differences; the largest of the three.
    """
    x = np.pad(video.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    vertical = x[:, 2:, 1:-1] - x[:, :-2, 1:-1]
    horizontal = x[:, 1:-1, 2:] - x[:, 1:-1, :-2]
    found = np.hypot(vertical, horizontal).max(-1, keepdims=True)
    return np.clip(found, 0, 255).astype(np.uint8).repeat(3, axis=-1)


VIEWS = {
    # Every frame as a picture.
    "stills": View(lambda x: x[:, None], _stills, lambda n, fps, _: np.arange(n) / fps),
    # Every second frame, as a clip of half the rate.
    "slow": View(
        lambda x: x[None, ::2], _slow, lambda n, fps, c: latent_times(n, fps / 2, c)
    ),
    # The clip at half its size.
    "small": View(lambda x: halved(x)[None], _small, latent_times, cell=2),
    # Its edges, as a clip.
    "edges": View(lambda x: edges(x)[None], lambda size, _: size, latent_times),
    # A second video of the same length and size: depth, a pose, a segmentation, ….
    "guide": View(lambda x: x[None], lambda size, _: size, latent_times, of="guide"),
    # The rays of its camera in each cell; no pictures.
    "camera": View(
        None,
        lambda size, _: size,
        latent_times,
        of="camera",
        measured=plucker_rays,
        per_frame=RAY,
    ),
}
# Of those that are made of more than the video: whether a clip has what it takes.
PRESENCE = {name: f"has_{name}" for name, view in VIEWS.items() if view.of != "video"}


# What training takes of them


class Beside(NamedTuple):
    """What training gives of a view.

    Attributes:
        view: its name in `VIEWS`.
        count: how many of its latent frames each clip is given, by how many there are
            and the numbers of the clips.
        chosen: which, by how many there are and are given.
        somewhere: they have a place in time.
    """

    view: str
    count: Callable[[int, Int[np.ndarray, "k"]], Int[np.ndarray, "k"]]
    chosen: Callable[[int, int, np.random.Generator], Int[np.ndarray, "f"]]
    somewhere: bool = True

    def part(
        self,
        latents: Float[np.ndarray, "f h w c"],
        count: int,
        fps: float,
        temporal_compression: int,
        rng: np.random.Generator,
    ) -> Part:
        """What is given of a clip.

        Args:
            latents: of the view, normalised.
            count: how many of its latent frames.
            fps: frames per second of the clip.
            temporal_compression: pixel frames of a latent frame after the first.
            rng: decides which.
        """
        view = VIEWS[self.view]
        which = self.chosen(len(latents), count, rng)
        times = view.times(len(latents), fps, temporal_compression)[which]
        if not self.somewhere:
            times = _REFERENCE * np.arange(1, count + 1)
        return Part(latents[which], times, view.cell)


def _some(stored: int, clips: Int[np.ndarray, "k"]) -> Int[np.ndarray, "k"]:
    """One to `MOST_STILLS`, always the same of a clip."""
    count = 1 + (stable_hash(19, clips) % np.uint64(MOST_STILLS)).astype(np.int64)
    return np.minimum(count, stored - 1)


def _all(stored: int, clips: Int[np.ndarray, "k"]) -> Int[np.ndarray, "k"]:
    return np.full(len(clips), stored)


def _scattered(stored: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(stored, count, replace=False))


def _last(stored: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(stored - count, stored)


KEYFRAMES = Beside("stills", _some, _scattered)
SUFFIX = Beside("stills", _some, _last)
REFERENCES = Beside("stills", _some, _scattered, somewhere=False)
SLOW = Beside("slow", _all, _last)
SMALL = Beside("small", _all, _last)


# What a request gives


def keyframes(request: Asked, place: Place) -> Known:
    """Pictures at any times."""
    return _pictures(request.pictures_in_time(), place)


def suffix(request: Asked, place: Place) -> Known:
    """The last frame, or the frames of footage that the clip ends with."""
    frames, fps = request.size[0], request.fps or 1.0
    video, last = request.clip("suffix"), request.end("last_image")
    if video is None:
        video = np.zeros((0, 0, 0, 3), np.uint8) if last is None else last[None]
    first = frames - len(video)
    return _pictures([((first + i) / fps, x) for i, x in enumerate(video)], place)


def references(request: Asked, place: Place) -> Known:
    """Pictures of what is to appear."""
    found = enumerate(request.reference_pictures(), 1)
    return _pictures([(_REFERENCE * i, x) for i, x in found], place)


def _pictures(given: list[tuple[float, np.ndarray]], place: Place) -> Known:
    if not given:
        return Known()
    latents = [place.encode(to_pixels(picture)[None]) for _, picture in given]
    times = np.array([time for time, _ in given])
    return Known(parts=(Part(np.concatenate(latents), times),))


def slow(request: Asked, place: Place) -> Known:
    """Footage of half the rate."""
    return _footage("interpolate", "slow", request, place)


def small(request: Asked, place: Place) -> Known:
    """Footage of half the size."""
    return _footage("upscale", "small", request, place)


def outlines(request: Asked, place: Place) -> Known:
    """The edges of footage, as channels beside the noise."""
    video = request.clip("edges")
    if video is None:
        return Known()
    return Known(cond=place.encode(to_pixels(edges(video))))


def guide(request: Asked, place: Place) -> Known:
    """A second video, which tells of the clip what it shows, as channels."""
    video = request.clip("guide")
    return Known() if video is None else Known(cond=place.encode(to_pixels(video)))


def camera(request: Asked, place: Place) -> Known:
    """The path of the camera, as the rays of each cell: channels."""
    poses = request.poses()
    if poses is None:
        return Known()
    _, height, width = request.size
    side = place.spatial_compression
    size = place.frames, height // side, width // side
    return Known(cond=plucker_rays(poses, size, place.temporal_compression))


def _footage(field: str, name: str, request: Asked, place: Place) -> Known:
    video, view = request.clip(field), VIEWS[name]
    if video is None:
        return Known()
    latents = place.encode(to_pixels(video))
    fps = request.fps or 1.0
    times = view.times(len(latents), float(fps), place.temporal_compression)
    return Known(parts=(Part(latents, times, view.cell),))
