"""What is known of a clip besides its text, and what a request says of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

# Pixels in [-1, 1] [T H W 3] to normalised latents [f h w c].
Encode = Callable[[Float[np.ndarray, "T H W 3"]], Float[np.ndarray, "f h w c"]]
# Samples in [-1, 1] [a e] to normalised latents [n c].
EncodeSound = Callable[[Float[np.ndarray, "a e"]], Float[np.ndarray, "n c"]]


class Part(NamedTuple):
    """A picture or a clip that was encoded by itself and lies beside the clip, clean.

    Attributes:
        latents: normalised.
        times: seconds at which each latent frame lies in the clip; below 0: nowhere.
        cell: side of its cells, in cells of the clip.
    """

    latents: Float[np.ndarray, "f h w c"]
    times: Float[np.ndarray, "f"]
    cell: int = 1


class Tail(NamedTuple):
    """The end of a clip that another goes on from, in latents.

    Attributes:
        picture: its last latent frames, none of them the first of a clip.
        sound: latents of the sound from then on; None: there is none.
        late: seconds from the last pixel frame before those of `picture` until its
            sound begins, less than a latent of it lasts.
    """

    picture: Float[np.ndarray, "f h w c"]
    sound: Float[np.ndarray, "n e"] | None = None
    late: float = 0.0


class Known(NamedTuple):
    """What is known of a clip, on the grid of its latents and beside it.

    Attributes:
        latents: of the tokens that are clean.
        clean: which cells are.
        parts: tokens beside those of the clip.
        cond: channels beside the noise.
        control: the signal for control blocks.
        image: states of an image encoder.
        lead: latent frames that come before the clip, and are cut off at the end.
        headless: the clip begins amid another: without the first latent frame, which
            alone is of one pixel frame.
        sound: latents of the sound, or of its beginning.
        sound_clean: which of them are given; None: all.
        late: seconds after which the sound begins.
    """

    latents: Float[np.ndarray, "f h w c"] | None = None
    clean: Bool[np.ndarray, "f h w"] | None = None
    parts: tuple[Part, ...] = ()
    cond: Float[np.ndarray, "f h w u"] | None = None
    control: Float[np.ndarray, "f h w v"] | None = None
    image: Float[np.ndarray, "i z"] | None = None
    lead: int = 0
    headless: bool = False
    sound: Float[np.ndarray, "n e"] | None = None
    sound_clean: Bool[np.ndarray, "n"] | None = None
    late: float = 0.0


@runtime_checkable
class Asked(Protocol):
    """What conditions read of a request; pictures are uint8, at the clip's size."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clip in pixels."""
        ...

    @property
    def fps(self) -> float | int | None:
        """Frames per second of the clip."""
        ...

    @property
    def ends(self) -> list[np.ndarray]:
        """The first and the last frame `[H W 3]`, those that are given."""
        ...

    def end(self, name: str) -> np.ndarray | None:
        """One of them, `image` or `last_image`."""
        ...

    def clip(self, name: str) -> np.ndarray | None:
        """`video`, `mask`, `from_video`, … `[T H W 3]`."""
        ...

    @property
    def tail(self) -> Tail | None:
        """What the clip goes on from, amid a longer one."""
        ...

    def sound_of(self, name: str, rate: int, channels: int) -> np.ndarray | None:
        """The sound `[a e]` of footage; None: there is none."""
        ...

    def reference_pictures(self) -> list[np.ndarray]:
        """`references` `[H W 3]`."""
        ...

    def pictures_in_time(self) -> list[tuple[float, np.ndarray]]:
        """`keyframes`: seconds, and picture `[H W 3]`."""
        ...

    def poses(self) -> np.ndarray | None:
        """The camera of each frame `[T 16]`, see `cameras`; None: it isn't given."""
        ...

    def sound_spans(self) -> tuple[tuple[float, float], ...]:
        """`keep_sound`: seconds from and until which `from_sound` is kept."""
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
        latent_rate: latents of sound per second.
        channels: of the latents of pictures; only where signals lie side by side.
    """

    frames: int
    encode: Encode
    temporal_compression: int
    spatial_compression: int
    encode_sound: EncodeSound | None = None
    sound: tuple[int, int] = (0, 0)
    latent_rate: float = 0.0
    channels: int = 0


def merged(parts: Iterable[Known]) -> Known:
    """What is known by several conditions, put together.

    Of what two say about one cell, the later one counts. Channels beside the noise are
    zeros but where a condition has its own.
    """
    found = Known()
    for part in parts:
        fields = {
            name: value
            for name, value in part._asdict().items()
            if value is not None and name not in ("latents", "clean", "parts")
        }
        latents, clean = found.latents, found.clean
        if part.clean is not None and part.latents is not None:
            latents, clean = part.latents, part.clean
            if found.clean is not None:
                latents = np.where(clean[..., None], latents, found.latents)
                clean = clean | found.clean
        together: dict[str, Any] = {"latents": latents, "clean": clean}
        if found.sound is not None and part.sound is not None:
            sound = _over(_whole_sound(found), _whole_sound(part))
            together |= dict(zip(("sound", "sound_clean"), sound, strict=True))
            fields = {k: x for k, x in fields.items() if k not in together}
        for name in ("lead", "headless", "late"):
            fields[name] = max(getattr(found, name), getattr(part, name))
        if found.cond is not None and part.cond is not None:
            fields["cond"] = found.cond + part.cond
        found = found._replace(**fields, **together, parts=(*found.parts, *part.parts))
    return found


_Sound = tuple[np.ndarray, np.ndarray]  # latents, and which of them are given


def _whole_sound(known: Known) -> _Sound:
    assert known.sound is not None
    if known.sound_clean is not None:
        return known.sound, known.sound_clean
    return known.sound, np.ones(len(known.sound), bool)


def _over(below: _Sound, above: _Sound) -> _Sound:
    """What two say about the sound; where both do, the second counts."""
    count = max(len(below[1]), len(above[1]))
    (one, there), (other, here) = (
        (np.pad(x, ((0, count - len(x)), (0, 0))), np.pad(y, (0, count - len(y))))
        for x, y in (below, above)
    )
    return np.where(here[:, None], other, one), here | there


def to_pixels(pictures: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """uint8 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1
