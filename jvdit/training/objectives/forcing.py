"""Noise levels of their own for the chunks of a clip: diffusion forcing.

A causal network that has seen every mix of levels (arXiv:2407.01392) can go on from
frames that are finished while the next ones are still noise.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jvdit.diffusion.noise_path import TimestepPolicy
from jvdit.ranges import check_ranges
from jvdit.training.step import Batch


@dataclasses.dataclass(frozen=True)
class Forcing:
    """How often, and how, the chunks of a clip have levels of their own.

    Attributes:
        share: of the clips; the others have one level each.
        clean: of those, the share that begins with clean chunks, as many as are drawn
            evenly, as a clip does that goes on.
        chunks: the most that a clip has.

    Raises:
        ValueError: a share isn't one.
    """

    share: float = 0.0
    clean: float = 0.5
    chunks: int = 1

    def __post_init__(self):
        shares = {"share": self.share, "clean": self.clean}
        check_ranges(shares, "forcing.")

    def forced(
        self,
        batch: Batch,
        key: PRNGKeyArray,
        policy: TimestepPolicy,
        chunk: Int[Array, "b n"],
        t: Float[Array, "b m"],
    ) -> dict[str, Any]:
        """Gives each chunk of each clip a level.

        Args:
            batch: a packed batch of pictures.
            key: random key.
            policy: the distribution of times.
            chunk: the number of each token's chunk in its clip.
            t: a time for each clip, for those that have one.

        Returns:
            The batch, in which what is clean is at level 0 and chunk i of clip j at
            level j * `chunks` + i + 1, with the times `t` [b m * chunks] of these.
        """
        shape, segment = batch["valid"].shape, batch["segment"]
        keys = jax.random.split(key, 4)
        forced = jax.random.bernoulli(keys[0], self.share, shape)
        begun = forced & jax.random.bernoulli(keys[1], self.clean, shape)
        member = jax.nn.one_hot(segment, shape[1] + 1)[..., 1:]
        counts = (member * (chunk + 1)[..., None]).max(1)  # chunks of each clip
        sizes = jnp.maximum(member.sum(1), 1)[..., None]
        own = policy.sample(
            keys[2], jnp.broadcast_to(sizes, (*sizes.shape[:2], self.chunks))
        )
        times = jnp.where(forced[..., None], own, t[..., None])
        # At least the last chunk is left to be learned.
        first = jax.random.uniform(keys[3], shape) * counts
        first = jnp.where(begun, first.astype(jnp.int32), 0)
        clip = jnp.maximum(segment - 1, 0)
        clean = chunk < jnp.take_along_axis(first, clip, axis=1)
        level = jnp.where(clean, 0, clip * self.chunks + chunk + 1)
        level = jnp.where(batch["level"] > 0, level, 0)
        return {**batch, "level": level, "t": times.reshape(shape[0], -1)}
