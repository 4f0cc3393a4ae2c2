"""Shortcuts around the stages of a video autoencoder, without parameters.

They are what the Wan 2.2 autoencoder adds to that of Wan 2.1; the idea is that of DC-AE
(arXiv:2410.10733).
"""

import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float


def average_down(
    x: Float[Array, "b f h w c"], features: int, time: int, space: int
) -> Float[Array, "b g i j d"]:
    """Moves cells of time x space x space to the channels, and averages groups.

    Zeros before the first frame complete its cell.

    Raises:
        ValueError: the channels don't form equal groups.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    cell = {"u": time, "r": space, "q": space}
    x = rearrange(x, "b (f u) (h r) (w q) c -> b f h w (c u r q)", **cell)
    if features % x.shape[-1] == 0:
        return jnp.repeat(x, features // x.shape[-1], axis=-1)
    if x.shape[-1] % features:
        raise ValueError(
            f"a residual shortcut averages {x.shape[-1]} channels to {features}, which "
            "must divide them; choose multipliers that are powers of two."
        )
    return reduce(x, "b f h w (d g) -> b f h w d", "mean", d=features)


def duplicate_up(
    x: Float[Array, "b f h w c"], features: int, time: int, space: int
) -> Float[Array, "b g i j d"]:
    """Repeats channels, and moves them to cells of time x space x space.

    Raises:
        ValueError: the channels can't be repeated equally.
    """
    wanted = features * time * space**2
    if wanted % x.shape[-1]:
        raise ValueError(
            f"a residual shortcut repeats {x.shape[-1]} channels to {wanted}, which "
            "they must divide; choose multipliers that are powers of two."
        )
    x = jnp.repeat(x, wanted // x.shape[-1], axis=-1)
    cell = {"u": time, "r": space, "q": space}
    return rearrange(x, "b f h w (d u r q) -> b (f u) (h r) (w q) d", **cell)
