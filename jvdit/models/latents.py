"""What autoencoders of every kind have in common: the statistics of their latents."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jvdit.models.dense import Layer, along_last

# Bounds of the log variance: its exponential stays finite and positive in float32.
LOGVAR_RANGE = (-30.0, 20.0)


class Autoencoder(Layer, kw_only=True):
    """An autoencoder whose latents have a mean and a standard deviation by channel.

    Attributes:
        latent_channels: channels of a latent.
        latents_mean: mean of each latent channel over the data; None: 0.
        latents_std: standard deviation of each latent channel; None: 1.
    """

    latent_channels: int = 16
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None

    def normalize(self, latents: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Gives each channel mean 0 and standard deviation 1 over the data."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """The inverse of `normalize`: what `decode` takes."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Array) -> tuple[Array, Array]:
        given = ((self.latents_mean, 0.0), (self.latents_std, 1.0))
        mean, std = (
            jnp.asarray((d,) * self.latent_channels if v is None else v, jnp.float32)
            for v, d in given
        )
        return along_last(mean, latents), along_last(std, latents)


def moments_of(
    moments: Float[Array, "*n c2"],
) -> tuple[Float[Array, "*n c"], Float[Array, "*n c"]]:
    """Splits moments into the mean and the log variance of a posterior, in float32."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)
