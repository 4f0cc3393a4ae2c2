"""What a causal network keeps of the tokens before: keys and values, in a window.

Chunk after chunk is denoised while those before stay as they are, so their keys and
values are computed once, when a chunk is finished, and kept in the collection "cache".
They are kept as they are before rotary positions turn them: so the window can move.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jvdit.shapes import Visible


@flax.struct.dataclass
class Past:
    """The tokens whose keys and values are kept: [sink | the newest ones].

    Attributes:
        position: RoPE coordinates (t, y, x) of each place.
        count: how many places are filled, the first ones.
        sink: how many tokens stay for good when the others move on
            (arXiv:2309.17453): the first of the clip.
    """

    position: Float[Array, "b s 3"]
    count: Int[Array, ""]
    sink: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def empty(cls, rows: int, length: int, sink: int = 0) -> "Past":
        """Room for so many tokens.

        Raises:
            ValueError: the sink takes all of it.
        """
        if not 0 <= sink < length:
            raise ValueError(
                f"`sink` (={sink}) must be from 0 to {length - 1}: of the {length} "
                "tokens that are kept some must be the newest."
            )
        return cls(jnp.zeros((rows, length, 3)), jnp.int32(0), sink)

    @property
    def filled(self) -> Bool[Array, "s"]:
        """Which places are."""
        return jnp.arange(self.position.shape[1]) < self.count

    def seen_with(self, tokens: int) -> Visible:
        """What each of so many tokens sees: what is kept, and one another."""
        rows = len(self.position)
        kept = jnp.broadcast_to(self.filled.astype(jnp.int32), (rows, len(self.filled)))
        own = jnp.ones((rows, tokens), jnp.int32)
        return Visible(jnp.concatenate([kept, own], axis=1), own)

    def moved(
        self, kept: Shaped[Array, "b s ..."], new: Shaped[Array, "b n ..."]
    ) -> Shaped[Array, "b s ..."]:
        """What is kept of each token once a chunk joins: the oldest ones leave.

        Args:
            kept: of the tokens that are there.
            new: of those of the chunk.
        """
        n, sink = new.shape[1], self.sink
        start = (0, self.count, *(0,) * (new.ndim - 2))
        grown = jax.lax.dynamic_update_slice(kept, new.astype(kept.dtype), start)
        rest = kept[:, sink + n :]
        rolled = jnp.concatenate([kept[:, :sink], rest, new.astype(kept.dtype)], axis=1)
        return jnp.where(self.is_full_for(n), rolled, grown)

    def is_full_for(self, tokens: int) -> Bool[Array, ""]:
        """Whether so many more don't fit without others leaving."""
        return self.count + tokens > self.position.shape[1]

    def after(self, position: Float[Array, "b n 3"]) -> "Past":
        """The past of the chunk that follows.

        Where others leave, the sink moves on in time by as much as they lasted, so that
        it stays as near as the network has seen it in training.

        Args:
            position: of the tokens of the chunk.
        """
        n, sink, length = position.shape[1], self.sink, self.position.shape[1]
        both = jnp.concatenate([self.position, position], axis=1)
        lasted = both[:, sink + n, 0] - both[:, sink, 0]
        still = (jnp.arange(length) >= sink)[None] | ~self.is_full_for(n)
        found = self.moved(self.position, position)
        t = found[..., 0] + jnp.where(still, 0.0, lasted[:, None])
        count = jnp.minimum(self.count + n, length).astype(jnp.int32)
        return Past(found.at[..., 0].set(t), count, sink)
