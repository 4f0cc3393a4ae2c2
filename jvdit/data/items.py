"""The tokens of one clip, whether it is learned from or asked for.

The loader makes an `Item` of a clip's latents, the sampler one of a request, both by
`item_of`: what is generated has the layout of what was learned.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jvdit.data.conditions.known import Known
from jvdit.data.patches import Size, frame_clock, part_positions, patchify, positions

# A posterior this narrow is a point: sampling it returns its mean.
POINT_LOGVAR = -30.0
KINDS = ("picture", "sound")  # what a token is of; a row has them in this order


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip (or one request) in tokens, ready to be put in a row.

    Attributes:
        latents: its tokens: those of its picture, what is given beside them, and those
            of its sound.
        position: (t, y, x) of each.
        sounds: how many are of its sound.
        beside: how many are of pictures and clips that are given beside it.
        level: of noise: 0 of those that are given, and stay clean; 1 of those that are
            generated.
        logvar: log variance of each, where `latents` is the mean of a posterior. None:
            `latents` is exact.
        text_ids: ids of its caption. Exactly one of this and `text_embeds` is given.
        text_embeds: states of a text encoder for its caption.
        cond: channels beside those of the tokens, see `Tokens`. Like `control`
            and `image`, either all items of a batch have it or none has.
        control: control signal under each token.
        image: states of an image encoder; such an item has a row to itself.
        clip_id: which clip it is, at least 0.
        valid: False for a clip that could not be read: it keeps its place and its id,
            but its tokens are padding.
    """

    latents: Float[np.ndarray, "n c"]
    position: Float[np.ndarray, "n 3"]
    sounds: int = 0
    beside: int = 0
    level: Int[np.ndarray, "n"] | int = 1
    logvar: Float[np.ndarray, "n c"] | None = None
    text_ids: Int[np.ndarray, "s"] | None = None
    text_embeds: Float[np.ndarray, "s e"] | None = None
    cond: Float[np.ndarray, "n u"] | None = None
    control: Float[np.ndarray, "n v"] | None = None
    image: Float[np.ndarray, "i z"] | None = None
    clip_id: int = 0
    valid: bool = True

    def __post_init__(self):
        if (self.text_ids is None) == (self.text_embeds is None):
            raise ValueError("Give exactly one of `text_ids` and `text_embeds`.")
        if len(self.latents) != len(self.position):
            raise ValueError(
                f"Clip {self.clip_id} has {len(self.latents)} tokens and "
                f"{len(self.position)} positions."
            )

    @property
    def text(self) -> Shaped[np.ndarray, "s ..."]:
        """Its caption, in whichever form it has."""
        text = self.text_embeds if self.text_ids is None else self.text_ids
        assert text is not None
        return text

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Where its tokens of each of `KINDS` begin and end."""
        pictures = len(self.latents) - self.sounds
        return (0, pictures), (pictures, len(self.latents))

    @property
    def is_given(self) -> bool:
        """Whether some of its tokens are."""
        return not np.all(self.level)


def item_of(
    latents: Float[np.ndarray, "f h w c"],
    *,
    patch_size: Size,
    fps: float,
    temporal_compression: int,
    seconds: bool = True,
    known: Known = Known(),  # noqa: B008 - immutable
    logvar: Float[np.ndarray, "f h w c"] | None = None,
    first: int = 0,
    **fields: Any,
) -> Item:
    """One clip in tokens.

    Args:
        latents: normalised; of a request noise, or zeros where it is drawn later.
        patch_size: latent frames, height and width of a token.
        fps: pixel frames per second.
        temporal_compression: pixel frames of a latent frame after the first.
        seconds: whether positions in time count seconds or latent frames.
        known: what is given of it.
        logvar: of the posterior of which `latents` is the mean.
        first: number of the first latent frame; 1 of a clip that begins amid another.
        **fields: of the `Item`: its text, its `clip_id`.
    """
    if known.clean is not None:
        clean = known.clean[..., None]
        latents = np.where(clean, known.latents, latents)
        logvar = None if logvar is None else np.where(clean, POINT_LOGVAR, logvar)
        clean = patchify(clean, patch_size).all(axis=-1)
        fields["level"] = 1 - clean.astype(np.int32)
    of_latents = {"cond": known.cond, "control": known.control, "logvar": logvar}
    for name, value in of_latents.items():
        fields[name] = None if value is None else patchify(value, patch_size)
    clock = fps if seconds else None, temporal_compression, first
    place = positions(latents.shape[:3], patch_size, *clock)
    tokens = patchify(latents, patch_size).astype(np.float32)
    item = Item(tokens, place, image=known.image, **fields)
    for part in known.parts:
        times = part.times
        if not seconds:
            times = frame_clock(times, fps, temporal_compression)
        place = part_positions(part.latents.shape[:3], patch_size, times, part.cell)
        more = {"level": 0, "logvar": POINT_LOGVAR, "beside": item.beside + len(place)}
        item = _longer(item, patchify(part.latents, patch_size), place, **more)
    return item


def with_sound(
    item: Item,
    latents: Float[np.ndarray, "n c"],
    position: Float[np.ndarray, "n 3"],
    *,
    given: Bool[np.ndarray, "n"] | bool = False,
    logvar: Float[np.ndarray, "n c"] | None = None,
) -> Item:
    """Adds the tokens of its sound to a clip in tokens of its picture.

    Args:
        item: the clip.
        latents: of its sound, normalised; of a request noise, or zeros.
        position: of each, see `sound_positions`.
        given: which of it is given, and stays clean.
        logvar: of the posterior of which `latents` is the mean.
    """
    given = np.broadcast_to(np.asarray(given), len(latents))
    if logvar is not None:
        logvar = np.where(given[:, None], POINT_LOGVAR, logvar)
    more = {"level": 1 - given, "logvar": logvar, "sounds": len(latents)}
    return _longer(item, latents, position, **more)


def _longer(
    item: Item,
    latents: np.ndarray,
    position: np.ndarray,
    *,
    level: Any,
    logvar: Any,
    **fields: Any,
) -> Item:
    """Adds tokens to a clip, after all others.

    Args:
        item: the clip.
        latents: of the new tokens.
        position: of each.
        level: of each, or of all.
        logvar: of the posteriors whose means `latents` are; None: they are exact.
        **fields: of the item that is then made: how many tokens are of what.
    """
    count, width = len(latents), max(item.latents.shape[1], latents.shape[1])
    before = np.broadcast_to(item.level, len(item.latents))
    after = np.broadcast_to(level, count)
    fields["latents"] = _joined(item.latents, latents, width)
    fields["position"] = np.concatenate([item.position, position])
    fields["level"] = np.concatenate([before, after]).astype(np.int32)
    if item.logvar is not None or isinstance(logvar, np.ndarray):
        parts = (
            np.full(x.shape, POINT_LOGVAR, np.float32)
            if known is None
            else np.broadcast_to(known, x.shape)
            for x, known in ((item.latents, item.logvar), (latents, logvar))
        )
        fields["logvar"] = _joined(*parts, width, POINT_LOGVAR)
    for name in ("cond", "control"):
        if (value := getattr(item, name)) is not None:
            blank = np.zeros((count, *value.shape[1:]), value.dtype)
            fields[name] = np.concatenate([value, blank])
    return dataclasses.replace(item, **fields)


def _joined(pictures: Any, sounds: Any, width: int, fill: float = 0.0) -> np.ndarray:
    """Tokens one after another, made as wide as the widest."""
    parts = [
        np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill)
        for x in (pictures, sounds)
    ]
    return np.concatenate(parts).astype(np.float32)


class Statistics(NamedTuple):
    """What makes stored latents those that a network sees.

    Attributes:
        mean: of each channel, which is subtracted.
        std: standard deviation of each, which is divided by.
        rate: latents per second, of a sound; 0: of a picture.
    """

    mean: np.ndarray
    std: np.ndarray
    rate: float = 0.0

    @property
    def width(self) -> int:
        """Channels of a latent."""
        return len(self.mean)

    @classmethod
    def of(cls, vae: Any) -> "Statistics":
        """Those of a finished autoencoder of any kind."""
        both = vae.latents_mean, vae.latents_std
        mean, std = (np.asarray(x, np.float32) for x in both)
        return cls(mean, std, getattr(vae, "latent_rate", 0.0))

    def normalized(self, mean: Any, logvar: Any) -> tuple[np.ndarray, Any]:
        """The mean, and log variance if there is one, of a posterior, normalised."""
        made = (np.asarray(mean, np.float32) - self.mean) / self.std
        if logvar is None:
            return made, None
        return made, np.asarray(logvar, np.float32) - 2 * np.log(self.std)
