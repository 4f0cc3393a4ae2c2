"""Rows of several kinds of tokens: what belongs to one kind goes through a slice.

A row comes with the tokens of each kind side by side. Inside of a network they lie so
that each device along `context` has its share of every kind: taking a kind's tokens out
of a row, and putting them back, then moves nothing between devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

# Ends of the names of the parameters of each kind, as `data.items.KINDS` has them.
SUFFIXES = ("", "_sound")


def ways() -> int:
    """How many devices divide the tokens of a row."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def join(parts: Sequence[Shaped[Array, "b _ ..."]]) -> Shaped[Array, "b n ..."]:
    """One row of the tokens of each kind.

    Raises:
        ValueError: the tokens of a kind can't be divided over the devices.
    """
    if len(parts) == 1:
        return parts[0]
    count, divided = ways(), []
    for part in parts:
        b, n, *rest = part.shape
        if n % count:
            raise ValueError(
                f"{n} tokens of a kind must be divisible by `mesh.context` (={count}); "
                f"make it {-(-n // count) * count}."
            )
        divided.append(part.reshape(b, count, n // count, *rest))
    joined = jnp.concatenate(divided, axis=2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def split(
    row: Shaped[Array, "b n ..."], kinds: Sequence[int]
) -> list[Shaped[Array, "b _ ..."]]:
    """The tokens of each kind of a row; undoes `join`.

    Args:
        row: tokens.
        kinds: how many there are of each kind; (): the row is of one.
    """
    if not kinds:
        return [row]
    count = ways()
    b, _, *rest = row.shape
    row = row.reshape(b, count, -1, *rest)
    ends = [sum(kinds[: i + 1]) // count for i in range(len(kinds) - 1)]
    parts = jnp.split(row, ends, axis=2)
    return [part.reshape(b, -1, *rest) for part in parts]


def side_by_side(
    row: Shaped[Array, "b n ..."], kinds: Sequence[int]
) -> list[Shaped[Array, "b _ ..."]]:
    """The tokens of each kind of a row as it comes, one kind after another."""
    ends = [sum(kinds[: i + 1]) for i in range(len(kinds) - 1)]
    return jnp.split(row, ends, axis=1) if kinds else [row]


def laid_out(
    row: Shaped[Array, "b n ..."], kinds: Sequence[int]
) -> Shaped[Array, "b n ..."]:
    """A row as it comes, as it lies inside of a network."""
    return join(side_by_side(row, kinds))
