"""What may be known of a clip besides its text, as a network takes it.

A model's file names its conditions, rows of `CONDITIONS`. Each says which pictures of a
request it takes and needs, and turns them into what is `Known` on the grid of latents:
tokens that are clean, channels beside the noise, or a control signal. Training marks
what it gives by the same names, see `may_be_given`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8

from jvdit.data.patches import Size

# Pixels in [-1, 1] [T H W 3] to normalised latents [f h w c].
Encode = Callable[[Float[np.ndarray, "T H W 3"]], Float[np.ndarray, "f h w c"]]
# Samples in [-1, 1] [a e] to normalised latents [n c].
EncodeSound = Callable[[Float[np.ndarray, "a e"]], Float[np.ndarray, "n c"]]


class Known(NamedTuple):
    """What is known of a clip, on the grid of its latents.

    Attributes:
        latents: of the tokens that are clean.
        clean: which cells are.
        cond: channels beside the noise.
        control: the signal for control blocks.
        image: states of an image encoder.
        lead: latent frames that come before the clip, and are cut off at the end.
        sound: latents of the sound, which are clean.
    """

    latents: Float[np.ndarray, "f h w c"] | None = None
    clean: Bool[np.ndarray, "f h w"] | None = None
    cond: Float[np.ndarray, "f h w u"] | None = None
    control: Float[np.ndarray, "f h w v"] | None = None
    image: Float[np.ndarray, "i z"] | None = None
    lead: int = 0
    sound: Float[np.ndarray, "n e"] | None = None


@runtime_checkable
class Asked(Protocol):
    """What conditions read of a request; pictures are uint8, at the clip's size."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clip in pixels."""
        ...

    @property
    def ends(self) -> list[np.ndarray]:
        """The first and the last frame `[H W 3]`, those that are given."""
        ...

    def clip(self, name: str) -> np.ndarray | None:
        """`video` or `mask` `[T H W 3]`."""
        ...

    def reference_pictures(self) -> list[np.ndarray]:
        """`references` `[H W 3]`."""
        ...

    def waveform(self, rate: int, channels: int) -> np.ndarray | None:
        """`from_sound` `[a e]`, as long as the clip."""
        ...


class Place(NamedTuple):
    """Where what is known lies.

    Attributes:
        frames: latent frames of the clip.
        encode: pixels to normalised latents.
        temporal_compression: pixel frames of a latent frame after the first.
        spatial_compression: pixels of a latent, along a side.
        encode_sound: samples to normalised latents, of a model that has sound.
        sound: its samples per second, and its channels.
    """

    frames: int
    encode: Encode
    temporal_compression: int
    spatial_compression: int
    encode_sound: EncodeSound | None = None
    sound: tuple[int, int] = (0, 0)


class Condition(NamedTuple):
    """A row of `CONDITIONS`.

    Attributes:
        known: makes it of a request that has what the condition needs.
        takes: fields of a request that it makes use of.
        needs: those without which it can't be.
        marks: the tokens of a clip that training gives, from how many there are along
            time, height and width; None: training doesn't give it by clean tokens.
    """

    known: Callable[[Asked, Place], Known]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    marks: Callable[[Size], Bool[np.ndarray, "f h w"]] | None = None


def known(conditions: Sequence[str], request: Asked, place: Place) -> Known:
    """What is known of a clip by the conditions of its model.

    Args:
        conditions: names of `CONDITIONS`.
        request: that `check_given` let pass.
        place: of the clip.
    """
    found: dict[str, Any] = {}
    for name in conditions:
        parts = CONDITIONS[name].known(request, place)._asdict()
        found |= {k: v for k, v in parts.items() if v is not None}
    return Known(**found)


def check_given(conditions: Sequence[str], given: Sequence[str]) -> None:
    """Raises ValueError if pictures of a request aren't those that a model takes.

    Args:
        conditions: of the model.
        given: the names of the pictures.
    """
    rows = [CONDITIONS[name] for name in conditions]
    takes = dict.fromkeys(x for row in rows for x in row.takes)
    for name in given:
        if name not in takes:
            told = " and ".join(f"`{x}`" for x in takes) or "no pictures"
            raise ValueError(f"`{name}` was given, but this model takes {told}.")
    for name in (x for row in rows for x in row.needs):
        if name not in given:
            raise ValueError(f"this model needs `{name}`: give it a picture.")
    if "mask" in given and "video" not in given:
        raise ValueError("`mask` says what to keep of `video`; give both.")


def check_conditions(conditions: Sequence[str]) -> tuple[str, ...]:
    """The conditions; raises ValueError if one isn't a row of `CONDITIONS`."""
    for name in conditions:
        if name not in CONDITIONS:
            raise ValueError(
                f"{name!r} is no condition that is known: {', '.join(CONDITIONS)}."
            )
    return tuple(conditions)


def may_be_given(conditions: Sequence[str], grid: Size) -> UInt8[np.ndarray, "n"]:
    """Which conditions may give each token of a clip in training.

    Args:
        conditions: that training gives, at most eight rows of `CONDITIONS` that mark
            tokens.
        grid: tokens of the clip along time, height and width.

    Returns:
        A bit for each condition, in their order.
    """
    found = np.zeros(grid, np.uint8)
    for number, name in enumerate(conditions):
        marks = CONDITIONS[name].marks
        if marks is not None:
            found |= marks(grid).astype(np.uint8) << number
    return found.reshape(-1)


def to_pixels(pictures: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """uint8 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1


def _first_frame(request: Asked, place: Place) -> Known:
    """A given first frame as clean tokens."""
    if not (ends := request.ends):
        return Known()
    latent = place.encode(to_pixels(ends[0])[None])
    latents = np.zeros((place.frames, *latent.shape[1:]), np.float32)
    clean = np.zeros(latents.shape[:3], bool)
    latents[0], clean[0] = latent[0], True
    return Known(latents=latents, clean=clean)


def _first(grid: Size) -> Bool[np.ndarray, "f h w"]:
    """The first frame of a clip; a picture has nothing after it to be learned."""
    found = np.zeros(grid, bool)
    found[0] = grid[0] > 1
    return found


def _channels(request: Asked, place: Place) -> Known:
    """A clip's first, and perhaps last, frame as channels beside the noise (Wan I2V).

    They are, for each latent frame, which of its pixel frames are given, and the
    latents of the clip that is grey where none is.
    """
    video = np.zeros((*request.size, 3), np.float32)
    known = np.zeros(len(video), np.float32)
    for number, picture in zip((0, -1), request.ends, strict=False):
        video[number], known[number] = to_pixels(picture), 1
    latents = place.encode(video)
    f, h, w, _ = latents.shape
    first = np.repeat(known[:1], place.temporal_compression)
    known = np.concatenate([first, known[1:]]).reshape(f, -1)
    mask = repeat(known, "f r -> f h w r", h=h, w=w)
    return Known(cond=np.concatenate([mask, latents], axis=-1))


def _control(request: Asked, place: Place) -> Known:
    """Footage, what to change of it, and pictures to show, for control blocks (VACE).

    Without a video everything is generated. The mask is white where to generate; none:
    everywhere. A pixel of footage stays or goes whole, at half white; the network is
    shown the greys themselves. Each reference is a latent frame before the clip.
    """
    video, mask = request.clip("video"), request.clip("mask")
    references = request.reference_pictures()
    shape = *request.size, 3
    pixels = np.zeros(shape, np.float32) if video is None else to_pixels(video)
    grey = np.ones(request.size, np.float32)
    if mask is not None:
        grey = mask[..., 0].astype(np.float32) / 255
    change = (grey > 0.5)[..., None]
    keep, new = place.encode(pixels * ~change), place.encode(pixels * change)
    side = dict.fromkeys(("p", "q"), place.spatial_compression)
    cells = rearrange(grey, "T (h p) (w q) -> T h w (p q)", **side)
    # The pixel frame in the middle of each latent one, as if they were evenly spread.
    middle = (np.arange(len(new)) + 0.5) * len(cells) / len(new)
    control = np.concatenate([keep, new, cells[middle.astype(int)]], axis=-1)
    for picture in references:
        latent = place.encode(to_pixels(picture)[None])
        blank = np.zeros((*latent.shape[:3], control.shape[-1] - latent.shape[-1]))
        lead = np.concatenate([latent, blank], axis=-1)
        control = np.concatenate([lead, control]).astype(np.float32)
    return Known(control=control, lead=len(references))


def _whole(request: Asked, place: Place) -> Known:
    """All of the picture, to which sound is made."""
    video = request.clip("from_video")
    if video is None:
        return Known()
    latents = place.encode(to_pixels(video))
    return Known(latents=latents, clean=np.ones(latents.shape[:3], bool))


def _waveform(request: Asked, place: Place) -> Known:
    """All of the sound, to which a picture is made."""
    audio = request.waveform(*place.sound)
    if audio is None or place.encode_sound is None:
        return Known()
    return Known(sound=place.encode_sound(audio))


_BOTH = ("image", "last_image")
CONDITIONS = {
    # Clean tokens: our own models, and Wan 2.2 TI2V.
    "first_frame": Condition(_first_frame, ("image",), marks=_first),
    # Channels beside the noise: Wan 2.2 I2V, 2.1 I2V, and 2.1 FLF2V.
    "end_channels": Condition(_channels, _BOTH, needs=("image",)),
    "first_channels": Condition(_channels, ("image",), needs=("image",)),
    "both_channels": Condition(_channels, _BOTH, needs=_BOTH),
    # One kind clean, see `pairings.PAIRINGS`.
    "picture_to_sound": Condition(_whole, ("from_video",)),
    "sound_to_picture": Condition(_waveform, ("from_sound",)),
    # A signal for control blocks: VACE.
    "control": Condition(_control, ("video", "mask", "references")),
}
