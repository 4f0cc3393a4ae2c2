"""What is learned of clips of picture and sound: one table of noise.

A row of `PAIRINGS` says how each kind comes: noisy, to be learned; clean, to be learned
from; or not at all. Noise that both have at times of their own keeps them from drifting
apart (arXiv:2511.21579, section 3.2), and each clean kind is a task of its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jvdit.diffusion.noise_path import TimestepPolicy
from jvdit.training.step import Batch

NOISY, CLEAN, ABSENT = range(3)


class Pairing(NamedTuple):
    """A row of `PAIRINGS`.

    Attributes:
        picture, sound: how each comes: NOISY, CLEAN or ABSENT.
        together: whether both are at one step of the way, see `sound_times`.
    """

    picture: int
    sound: int
    together: bool = False


PAIRINGS = {
    "together": Pairing(NOISY, NOISY, together=True),
    "apart": Pairing(NOISY, NOISY),
    "picture_to_sound": Pairing(CLEAN, NOISY),
    "sound_to_picture": Pairing(NOISY, CLEAN),
    "picture": Pairing(NOISY, ABSENT),
    "sound": Pairing(ABSENT, NOISY),
}
_SILENT = [*PAIRINGS].index("picture")


def check_pairings(shares: Mapping[str, float]) -> None:
    """Raises a ValueError unless the shares are of rows of `PAIRINGS`, and some > 0."""
    if unknown := set(shares) - set(PAIRINGS):
        known = ", ".join(PAIRINGS)
        raise ValueError(f"pairing {unknown.pop()!r} must be one of: {known}.")
    if not any(shares.values()):
        raise ValueError("`pairings` must have a share above 0.")


def sizes_by_kind(batch: Batch, kinds: tuple[int, ...]) -> Float[Array, "b kinds m"]:
    """How many tokens of each kind each clip of each row has."""
    clips = batch["valid"].shape[1]
    member = jax.nn.one_hot(batch["segment"], clips + 1)[..., 1:]
    ends = np.cumsum(kinds)[:-1].tolist()
    return jnp.stack([x.sum(1) for x in jnp.split(member, ends, axis=1)], axis=1)


def paired(
    batch: Batch,
    key: PRNGKeyArray,
    shares: Mapping[str, float],
    policy: TimestepPolicy,
    kinds: tuple[int, ...],
) -> dict[str, Any]:
    """Draws a row of the table for each clip, and the times of its kinds.

    A clip without sound is learned as a picture.

    Args:
        batch: a packed batch of two kinds.
        key: random key.
        shares: of the rows, in any unit.
        policy: the distribution of times; larger clips may have later ones.
        kinds: how many tokens of a row are of each kind.

    Returns:
        The batch, in which what is absent is padding and what is clean is at the clean
        level, with `t` [b kinds m].
    """
    keys = jax.random.split(key, 3)
    sizes, m = sizes_by_kind(batch, kinds), batch["valid"].shape[1]
    table = np.array([x[:2] for x in PAIRINGS.values()])
    share = np.array([shares.get(name, 0.0) for name in PAIRINGS])
    logits = jnp.log(jnp.asarray(share, jnp.float32))
    row = jax.random.categorical(keys[0], logits, shape=batch["valid"].shape)
    row = jnp.where(sizes[:, 1] > 0, row, _SILENT)
    comes = jnp.asarray(table)[row].swapaxes(1, 2)  # [b kinds m]
    together = jnp.asarray([x.together for x in PAIRINGS.values()])[row]
    policies = policy, policy.of_sound
    times = [
        policies[i].sample(k, jnp.maximum(sizes[:, i], 1))
        for i, k in enumerate(keys[1:])
    ]
    along = policy.sound_times(times[0])
    t = jnp.stack([times[0], jnp.where(together, along, times[1])], axis=1)

    def of_token(values: Array, fill: int) -> Array:
        """Spreads a value of each clip and kind to its tokens; padding has `fill`."""
        padded = jnp.pad(values, ((0, 0), (0, 0), (1, 0)), constant_values=fill)
        flat = padded.reshape(len(values), -1)
        kind = np.repeat(np.arange(len(kinds)), kinds) * (m + 1)
        return jnp.take_along_axis(flat, batch["segment"] + kind[None], axis=1)

    token = of_token(comes, ABSENT)
    clean = np.repeat(np.arange(len(kinds)), kinds)[None] * (m + 1)
    level = jnp.where(token == NOISY, batch["level"], clean)
    segment = jnp.where(token == ABSENT, 0, batch["segment"])
    return {**batch, "level": level, "segment": segment, "t": t}
