"""Encoding and decoding of sounds of any length in windows, in constant memory.

A window reaches `AudioVAE.margins` latents past those that are kept of it, so what is
kept is what the whole sound would have given. All windows of a sound have one length,
and so one compilation; those at its ends are moved inwards.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvdit.machine.compilation import jit
from jvdit.models.audio_vae import AudioVAE

WINDOW = 512  # latents of a window, margins included

_features, _moments, _decode = (
    functools.partial(jit, static_argnames="vae")(
        lambda vae, params, x, method=method: vae.apply(
            {"params": params}, x, method=method
        )
    )
    for method in ("features", "moments", "decode")
)


def encode_sound(
    vae: AudioVAE, params: Any, audio: Float[Any, "b a e"], window: int = WINDOW
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
    """Encodes sounds: mean and log variance of their latents, not normalised.

    Args:
        vae: the autoencoder.
        params: its parameters.
        audio: samples in [-1, 1].
        window: latents that are encoded at once.
    """
    spare = vae.length(audio.shape[1]) * vae.hop - audio.shape[1]
    audio = jnp.pad(audio, ((0, 0), (0, spare), (0, 0)))
    features = _in_windows(
        lambda piece: _features(vae, params, piece),
        audio,
        (vae.hop, 1),
        vae.margins[0],
        window,
    )
    return _moments(vae, params, features)


def decode_sound(
    vae: AudioVAE, params: Any, latents: Float[Any, "b n c"], window: int = WINDOW
) -> Float[Array, "b a e"]:
    """Decodes normalised latents to samples in [-1, 1], `hop` for each latent.

    Args:
        vae: the autoencoder.
        params: its parameters.
        latents: normalised.
        window: latents that are decoded at once.
    """
    return _in_windows(
        lambda piece: _decode(vae, params, vae.denormalize(piece)),
        jnp.asarray(latents),
        (1, vae.hop),
        vae.margins[1],
        window,
    )


def _in_windows(
    run: Callable[[Any], Array],
    x: Any,
    steps: tuple[int, int],
    margin: int,
    window: int,
) -> Array:
    """Runs over windows of `x`, of which `steps` entries in and out make a latent."""
    count = x.shape[1] // steps[0]
    window = max(window, 2 * margin + 1)
    if count <= window:
        return run(x)
    parts, kept = [], 0
    while kept < count:
        start = min(max(kept - margin, 0), count - window)
        last = start + window == count
        end = count if last else start + window - margin
        made = run(x[:, start * steps[0] : (start + window) * steps[0]])
        parts.append(made[:, (kept - start) * steps[1] : (end - start) * steps[1]])
        kept = end
    return jnp.concatenate(parts, axis=1)
