"""Conditions that are clean cells of the clip: how it begins, what to keep of it.

In training a condition marks cells of a clip, from its layout and random numbers; in
sampling it encodes what a request gives, and marks the same kind of cells.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jvdit.data.conditions.known import Asked, Known, Place, to_pixels
from jvdit.data.patches import Size

_ROUNDING = 1e-4  # seconds


class Layout(NamedTuple):
    """The tokens of a clip of which training gives some.

    Attributes:
        grid: how many there are along time, height and width.
        ends: seconds at which each of its frames ends.
        sounds: seconds at which each token of its sound ends.
    """

    grid: Size
    ends: Float[np.ndarray, "f"]
    sounds: Float[np.ndarray, "n"]

    def nothing(self) -> "Marks":
        """No token."""
        return Marks(np.zeros(self.grid, bool), np.zeros(len(self.sounds), bool))


class Marks(NamedTuple):
    """Which tokens of a clip are given.

    Attributes:
        cells: of its picture.
        sounds: of its sound.
    """

    cells: Bool[np.ndarray, "f h w"]
    sounds: Bool[np.ndarray, "n"]


# First frames


def first(layout: Layout, rng: np.random.Generator) -> Marks:
    """The first frame of a clip; a picture has nothing after it to be learned."""
    marks = layout.nothing()
    marks.cells[0] = layout.grid[0] > 1
    return marks


def first_frame(request: Asked, place: Place) -> Known:
    """A given first frame."""
    image = request.end("image")
    return Known() if image is None else _beginning(image[None], place)


def beginning(layout: Layout, rng: np.random.Generator) -> Marks:
    """A beginning of any length, and the sound until its end."""
    marks, frames = layout.nothing(), layout.grid[0]
    if frames > 1:
        count = int(rng.integers(1, frames))
        marks.cells[:count] = True
        marks.sounds[:] = layout.sounds <= layout.ends[count - 1] + 1e-6
    return marks


def prefix(request: Asked, place: Place) -> Known:
    """Given footage that the clip goes on from."""
    video = request.clip("prefix")
    if video is None:
        return Known()
    known = _beginning(video, place)
    audio = request.sound_of("prefix", *place.sound) if place.encode_sound else None
    if audio is None or place.encode_sound is None:
        return known
    return known._replace(sound=place.encode_sound(audio))


def _beginning(video: np.ndarray, place: Place) -> Known:
    # Whole latent frames; what is left over at the end is generated anew.
    compression = place.temporal_compression
    kept = 1 + (len(video) - 1) // compression * compression
    return _first(place.encode(to_pixels(video[:kept])), place.frames)


def _first(found: np.ndarray, frames: int) -> Known:
    """The first latents of a clip of so many latent frames."""
    latents = np.zeros((frames, *found.shape[1:]), np.float32)
    clean = np.zeros(latents.shape[:3], bool)
    latents[: len(found)], clean[: len(found)] = found, True
    return Known(latents=latents, clean=clean)


def tail(request: Asked, place: Place) -> Known:
    """Latents that the clip goes on from: it begins amid a longer one."""
    if (found := request.tail) is None:
        return Known()
    known = _first(found.picture, place.frames - 1)
    return known._replace(headless=True, late=found.late, sound=found.sound)


# Masks


def box(layout: Layout, rng: np.random.Generator) -> Marks:
    """A box in space and time, or all but a box; half of them last as long as the clip.

    What is inside a box is what inpainting makes; what is outside, outpainting.
    """
    marks, grid = layout.nothing(), layout.grid
    if grid[1] * grid[2] < 2:
        return marks
    sides = []
    for length in grid:
        size = max(1, round(length * rng.uniform(0.25, 0.75)))
        start = int(rng.integers(0, length - size + 1))
        sides.append(slice(start, start + size))
    if rng.random() < 0.5:
        sides[0] = slice(None)
    marks.cells[tuple(sides)] = True
    if rng.random() < 0.5 or marks.cells.all():
        np.logical_not(marks.cells, out=marks.cells)
    return marks


def masked(request: Asked, place: Place) -> Known:
    """Footage of which a mask, white where to generate, leaves the rest.

    A cell of latents is kept if all of its pixels are.
    """
    video, mask = request.clip("video"), request.clip("mask")
    if video is None or mask is None:
        return Known()
    latents = place.encode(to_pixels(video))
    return Known(latents=latents, clean=~changed(mask, place).any(axis=(2, 4)))


def changed(mask: np.ndarray, place: Place) -> Bool[np.ndarray, "f h p w q"]:
    """Which pixels of each latent frame a mask, white above the half, changes."""
    white = mask[..., 0] > 127
    first, rest = white[:1], white[1:]
    compression, side = place.temporal_compression, place.spatial_compression
    rest = rest.reshape(-1, compression, *white.shape[1:]).any(axis=1)
    frames = np.concatenate([first, rest])
    f, height, width = frames.shape
    return frames.reshape(f, height // side, side, width // side, side)


# Parts of the sound

_MOST_SPANS = 3


def spans(layout: Layout, rng: np.random.Generator) -> Marks:
    """A few spans of the sound, or all but them: some of it always, and never all."""
    marks, count = layout.nothing(), len(layout.sounds)
    if count < 2:
        return marks
    found = marks.sounds
    for _ in range(int(rng.integers(1, _MOST_SPANS + 1))):
        length = int(rng.integers(1, count // 2 + 1))
        start = int(rng.integers(0, count - length + 1))
        found[start : start + length] = True
    if rng.random() < 0.5:
        np.logical_not(found, out=found)
    if found.all() or not found.any():
        found[int(rng.integers(count))] ^= True
    return marks


def kept_sound(request: Asked, place: Place) -> Known:
    """A sound of which some spans are kept; the rest is made.

    A latent is kept if all of its samples are.
    """
    kept, audio = request.sound_spans(), request.waveform(*place.sound)
    if not kept or audio is None or place.encode_sound is None:
        return Known()
    rate, lasts = place.latent_rate, len(audio) / place.sound[0]
    starts = np.arange(int(np.ceil(lasts * rate - 1e-6))) / rate
    # The last one may be filled up beyond the end of the clip.
    ends = np.minimum(starts + 1 / rate, lasts)
    clean = np.zeros(len(starts), bool)
    for first, last in kept:
        whole = (starts >= first - _ROUNDING) & (ends <= last + _ROUNDING)
        if not whole.any():
            raise ValueError(
                f"`keep_sound` {first:g}:{last:g} holds no whole latent of the sound; "
                f"they begin every {1 / rate:g} s. Keep a longer span."
            )
        clean |= whole
    return Known(sound=place.encode_sound(audio), sound_clean=clean)


# One kind given whole


def nothing(request: Asked, place: Place) -> Known:
    """Nothing of what a request gives."""
    return Known()


def whole(request: Asked, place: Place) -> Known:
    """All of the picture, to which sound is made."""
    video = request.clip("from_video")
    if video is None:
        return Known()
    latents = place.encode(to_pixels(video))
    return Known(latents=latents, clean=np.ones(latents.shape[:3], bool))


def waveform(request: Asked, place: Place) -> Known:
    """All of the sound, to which a picture is made."""
    audio = request.waveform(*place.sound)
    if audio is None or place.encode_sound is None or request.sound_spans():
        return Known()
    return Known(sound=place.encode_sound(audio))
