"""Footage made anew from a part of its noise (SDEdit, arXiv:2108.01073)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jvdit.data.conditions.known import to_pixels
from jvdit.generation.codec import Codec
from jvdit.generation.request import Request
from jvdit.weights.bundle import Bundle


def noised(
    model: Bundle,
    codec: Codec,
    requests: Sequence[Request],
    steps: int,
    strength: float,
) -> dict[str, Any]:
    """What a solver begins with: the footage of each request, and noise.

    Args:
        model: the model.
        codec: its autoencoders.
        requests: complete ones; all of them have `restyle`.
        steps: that a solver would take from noise.
        strength: share of them that are taken, 0 to 1: the larger, the less of the
            footage is left.

    Returns:
        Arguments of `Generator.solve`: `noise`, and the `levels` of the steps.

    Raises:
        ValueError: some requests have no `restyle`, or sound.
    """
    if any(request.restyle is None for request in requests):
        raise ValueError("give `restyle` to all requests of a call, or to none.")
    if any(request.sound for request in requests):
        raise ValueError("`restyle` makes no sound; add it afterwards by `from_video`.")
    latents = []
    for request in requests:
        video = request.clip("restyle")
        assert video is not None
        latents.append(codec.encode(to_pixels(video)))
    tokens = float(np.prod(latents[0].shape[:3])) / np.prod(model.patch_size)
    times = model.policy.times(steps, jnp.full(1, tokens), model.path.timesteps)
    skipped = min(round(steps * (1 - strength)), steps - 1)
    levels = tuple(np.asarray(times)[skipped:-1, 0].tolist())
    first = jnp.asarray(levels[0])
    noise = [
        np.asarray(model.path.mix(jnp.asarray(x), _noise(request, x), first))
        for request, x in zip(requests, latents, strict=True)
    ]
    return {"noise": noise, "levels": levels, "steps": len(levels)}


def _noise(request: Request, like: np.ndarray) -> jnp.ndarray:
    rng = np.random.Generator(np.random.Philox(key=request.seed))
    return jnp.asarray(rng.standard_normal(like.shape, np.float32))
