"""The tokens of one clip, whether it is learned from or asked for.

The loader makes an `Item` of a clip's latents, the sampler one of a request, both by
`item_of`: what is generated has the layout of what was learned.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from jvdit.data.conditions import Known, may_be_given
from jvdit.data.patches import Size, patchify, positions, token_grid

KINDS = ("picture",)  # what a token is of, by number


@dataclasses.dataclass(frozen=True)
class Item:
    """One clip (or one request) in tokens, ready to be put in a row.

    Attributes:
        latents: its tokens.
        position: (t, y, x) of each.
        kind: which of `KINDS` each is.
        level: of noise: 0 of those that are given, and stay clean; 1 of those that are
            generated.
        givable: those that training may give, see `may_be_given`. None: this isn't
            for training.
        logvar: log variance of each, where `latents` is the mean of a posterior. None:
            `latents` is exact.
        text_ids: ids of its caption. Exactly one of this and `text_embeds` is given.
        text_embeds: states of a text encoder for its caption.
        cond: channels beside those of the tokens, see `Tokens`. Like `givable`,
            `control` and `image`, either all items of a batch have it or none has.
        control: control signal under each token.
        image: states of an image encoder; such an item has a row to itself.
        clip_id: which clip it is, at least 0.
        valid: False for a clip that could not be read: it keeps its place and its id,
            but its tokens are padding.
    """

    latents: Float[np.ndarray, "n c"]
    position: Float[np.ndarray, "n 3"]
    kind: Int[np.ndarray, "n"] | int = 0
    level: Int[np.ndarray, "n"] | int = 1
    givable: Bool[np.ndarray, "n"] | None = None
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
    def is_given(self) -> bool:
        """Whether some of its tokens are."""
        return not np.all(self.level)


def item_of(
    latents: Float[np.ndarray, "f h w c"],
    *,
    patch_size: Size,
    fps: float | None,
    temporal_compression: int,
    known: Known = Known(),  # noqa: B008 - immutable
    conditions: Sequence[str] | None = None,
    logvar: Float[np.ndarray, "f h w c"] | None = None,
    **fields: Any,
) -> Item:
    """One clip in tokens.

    Args:
        latents: normalised; of a request noise, or zeros where it is drawn later.
        patch_size: latent frames, height and width of a token.
        fps: pixel frames per second. None: positions in time count latent frames, see
            `positions`.
        temporal_compression: pixel frames of a latent frame after the first.
        known: of a request.
        conditions: what training may give. None: this is a request.
        logvar: of the posterior of which `latents` is the mean.
        **fields: of the `Item`: its text, its `clip_id`.
    """
    size = latents.shape[:3]
    if known.clean is not None:
        latents = np.where(known.clean[..., None], known.latents, latents)
        clean = patchify(known.clean[..., None], patch_size).all(axis=-1)
        fields["level"] = 1 - clean.astype(np.int32)
    for name, value in (
        ("cond", known.cond),
        ("control", known.control),
        ("logvar", logvar),
    ):
        fields[name] = None if value is None else patchify(value, patch_size)
    if conditions is not None:
        fields["givable"] = may_be_given(conditions, token_grid(size, patch_size))
    return Item(
        patchify(latents, patch_size),
        positions(size, patch_size, fps, temporal_compression),
        image=known.image,
        **fields,
    )
