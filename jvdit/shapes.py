"""The dimension key, and the pytrees that every model call takes.

Dimension names used in jaxtyping annotations and einsum strings all over jvdit:

====  =====================================  ====  ================================
name  meaning                                name  meaning
====  =====================================  ====  ================================
b     rows of a batch                        T H W pixel frames, height, width
n     tokens of a row                        f h w latent frames, height, width
m     clips packed into a row                c     channels
g     noise levels of a row (m + 1)*         d     model width
s     text tokens of a row                   q     attention heads
a     audio samples                          k     channels of a head
====  =====================================  ====  ================================

`t` is always diffusion time: 0 is data, 1 is noise.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Visible(NamedTuple):
    """What attention may see: a query sees the keys with `low <= id <= high`.

    One rule for every pattern. Clips packed into a row: a token's id and both of its
    bounds are the number of its clip. Chunk-causal in time: ids grow from chunk to
    chunk, `low` is the first id of the clip and `high` the token's own.

    Attributes:
        id: of each key; never negative.
        low: the least id that each query sees.
        high: the greatest; below `low` where a query sees nothing. None: `low`, as for
            packed clips, which takes one comparison in the place of two.
    """

    id: Int[Array, "b s"]
    low: Int[Array, "b n"]
    high: Int[Array, "b n"] | None = None

    @classmethod
    def packed(cls, segment: Int[Array, "b n"]) -> "Visible":
        """Tokens of packed clips see those of their own clip."""
        return cls(segment, segment)

    def among(self, id: Int[Array, "b s"]) -> "Visible":
        """What the same queries see of other keys, such as those of a text."""
        return self._replace(id=id)

    def mask(self) -> Bool[Array, "*b n s"]:
        """Whether each query sees each key."""
        id, low = self.id[..., None, :], self.low[..., None]
        if self.high is None:
            return id == low
        return (low <= id) & (id <= self.high[..., None])


@flax.struct.dataclass
class Tokens:
    """Latent tokens of one or more clips, packed into rows.

    Attributes:
        latents: the (noisy or clean) latent patches.
        position: RoPE coordinates (t, y, x). In our own models t is in seconds, so
            that every frame rate shares one clock, and y, x count latent cells.
        segment: which clip of its row a token belongs to, 1 to m; 0 is padding.
            None: every row is exactly one clip without padding.
        level: which of the row's noise levels `t[b g]` a token is at. None: all are
            at level 0. With segments, level 0 is pinned to t = 0 (clean: padding and
            conditioning tokens) and a clip's generated tokens are at its own segment.
            Each further kind has as many levels, of which the first is clean.
        cond: channels added at the patch embedding: what is known of the patch, such as
            a given first frame and a mask of where it is given; or None.
        control: patches of control signals that lie under the tokens, or None.
        visible: ids of the tokens, and the bounds of what each of them sees. None:
            attention never crosses segments; without segments every token sees
            every other, and attention takes the maskless kernel.
        kinds: how many tokens of a row are of each kind, which lie side by side:
            pictures, sounds. (): all are pictures'.
        frames: how many frames each row has if it is exactly one clip, frame after
            frame, each of the same cells in the same order. 0: rows aren't so, or
            differ; then attention patterns follow from positions alone.
    """

    latents: Float[Array, "b n c"]
    position: Float[Array, "b n 3"]
    segment: Int[Array, "b n"] | None = None
    level: Int[Array, "b n"] | None = None
    cond: Float[Array, "b n u"] | None = None
    control: Float[Array, "b n v"] | None = None
    visible: Visible | None = None
    kinds: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    frames: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        latents: Float[Array, "b n c"],
        *,
        one_clip: bool = False,
        given: bool = True,
        kinds: tuple[int, ...] = (),
        frames: int = 0,
    ) -> "Tokens":
        """The tokens of a packed batch, to be learned from or generated.

        Args:
            batch: see `pack_rows`.
            latents: clean or noisy ones, in the place of the batch's own.
            one_clip: every row is exactly one clip without padding: no mask.
            given: tokens may be given; if none is, and `one_clip`, all of a row are at
                one level.
            kinds: how many tokens of a row are of each kind; (): there is one kind.
            frames: of every row, if it is one grid.
        """
        names = "cond", "control"
        alike = one_clip and not (given or kinds)
        return cls(
            latents,
            batch["position"],
            segment=None if one_clip else batch["segment"],
            level=None if alike else batch["level"],
            kinds=kinds,
            frames=frames,
            **{name: batch[name] for name in names if name in batch},
        )

    @property
    def sees(self) -> Visible | None:
        """What self-attention sees; None: everything."""
        if self.visible is None and self.segment is not None:
            return Visible.packed(self.segment)
        return self.visible

    def with_latents(self, latents: Float[Array, "b n c"]) -> "Tokens":
        """The same tokens, noisier or cleaner."""
        return dataclasses.replace(self, latents=latents)

    def per_token(self, values: Float[Array, "b g"]) -> Float[Array, "b #n 1"]:
        """Spreads one value for each noise level to the tokens at that level.

        The token axis of the result has size 1 where all tokens share a level.
        """
        if self.level is None:
            return values[:, :1, None]
        return jnp.take_along_axis(values, self.level, axis=1)[..., None]


@flax.struct.dataclass
class Text:
    """Text states that the tokens attend to, by the rule of `Visible`.

    Attributes:
        embeds: states of the text encoder.
        segment: id of each state: which clip of its row it describes, or any id that
            exactly the tokens of that clip see; 0 is padding. None: every token of
            the row sees every state.
        image: states of an image encoder that every token of the row sees, or None.
    """

    embeds: Float[Array, "b s e"]
    segment: Int[Array, "b s"] | None = None
    image: Float[Array, "b i z"] | None = None

    def seen_by(self, tokens: Tokens) -> Visible | None:
        """Which states each token sees; None: all of them."""
        if self.segment is None:
            return None
        visible = tokens.sees
        if visible is None:  # one clip a row, but its text is padded
            visible = Visible.packed(jnp.ones(tokens.latents.shape[:2], jnp.int32))
        return visible.among(self.segment)


def apart(
    tokens: Tokens, text: Text, chosen: Bool[Array, "b m"] | None = None
) -> tuple[Tokens, Text]:
    """Keeps tokens of one kind from seeing those of the other in their clip.

    Both still see their text. Of clip k, pictures have the id 3k, texts 3k + 1, and
    sounds 3k + 2.

    Args:
        tokens: of two kinds.
        text: of their clips.
        chosen: of which clips of each row. None: of all.
    """
    b, n = tokens.latents.shape[:2]
    clip = jnp.ones((b, n), jnp.int32) if tokens.segment is None else tokens.segment
    pictures, sounds = (jnp.full(count, i) for i, count in enumerate(tokens.kinds))
    sound = jnp.concatenate([pictures, sounds])[None]
    cut = jnp.asarray(True)
    if chosen is not None:
        cut = jnp.pad(chosen, ((0, 0), (1, 0)))
        cut = jnp.take_along_axis(cut, clip, axis=1)
    first = 3 * clip
    visible = Visible(
        id=first + 2 * sound,
        low=first + jnp.where(cut, sound, 0),
        high=first + jnp.where(cut, 1 + sound, 2),
    )
    segment = text.segment
    if segment is None:
        segment = jnp.ones(text.embeds.shape[:2], jnp.int32)
    tokens = dataclasses.replace(tokens, visible=visible)
    return tokens, dataclasses.replace(text, segment=3 * segment + 1)
