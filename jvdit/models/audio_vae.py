"""Audio autoencoder: a waveform to latents at a few dozen a second, and back.

Convolutions over time alone, with snake activations (Oobleck, arXiv:2404.10301,
section 3.1). A latent looks at a bounded stretch of sound and a sample at a bounded
number of latents, `margins`, so that a sound of any length goes through in windows
(`audio_vae_chunked`). Released autoencoders are rows of the same table, `VARIANTS`.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.audio_vae_layers import Snake, Units, WaveConv, WaveDown, WaveUp
from jvdit.models.dense import Layer
from jvdit.models.dit_blocks import Attention
from jvdit.models.latents import Autoencoder, moments_of

_ENDS = 7  # taps of the first and the last convolution of the decoder
_FEATURES = 3  # taps of the last convolution of the encoder


class WaveCoder(Layer, kw_only=True):
    """The fields that both halves of the autoencoder share.

    Attributes:
        strides: samples of each stage for one of the next, fine to coarse; each stage
            has twice the channels of the one before.
        dilations: of the residual units of a stage.
    """

    strides: Sequence[int]
    dilations: Sequence[int] = (1, 3, 9)


class WaveHalf(WaveCoder):
    """The fields of one half.

    Attributes:
        width: channels of the finest stage.
        features: channels of the result.
    """

    width: int
    features: int


class WaveEncoder(WaveHalf):
    """Stages from fine to coarse."""

    @nn.compact
    def __call__(self, x: Float[Array, "b a p"]) -> Float[Array, "b n c"]:
        """Codes patches of samples as features."""
        x = WaveConv(self.width, name="conv_in", **self.types)(x)
        for i, stride in enumerate(self.strides):
            x = Units(self.dilations, name=f"units_{i}", **self.types)(x)
            x = Snake(name=f"snake_{i}", **self.types)(x)
            width = self.width * 2 ** (i + 1)
            x = WaveDown(width, stride=stride, name=f"down_{i}", **self.types)(x)
        x = Snake(name="snake_out", **self.types)(x)
        types: dict[str, Any] = self.types
        return WaveConv(self.features, taps=_FEATURES, name="conv_out", **types)(x)


class WaveDecoder(WaveHalf):
    """Stages from coarse to fine."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b a p"]:
        """Decodes features to patches of samples."""
        width = self.width * 2 ** len(self.strides)
        x = WaveConv(width, name="conv_in", **self.types)(x)
        for i in reversed(range(len(self.strides))):
            stride, width = self.strides[i], self.width * 2**i
            x = Snake(name=f"snake_{i}", **self.types)(x)
            x = WaveUp(width, stride=stride, name=f"up_{i}", **self.types)(x)
            x = Units(self.dilations, name=f"units_{i}", **self.types)(x)
        x = Snake(name="snake_out", **self.types)(x)
        types: dict[str, Any] = {"start": 0.1, **self.types}
        x = WaveConv(self.features, taps=_ENDS, name="conv_out", **types)(x)
        return jnp.tanh(x.astype(jnp.float32))


class AudioVAE(WaveCoder, Autoencoder):
    """Variational autoencoder of sound.

    Attributes:
        sample_rate: samples per second, in Hz.
        channels: of the waveform: 1, mono, or 2, stereo.
        encoder_width: channels of the encoder's finest stage.
        decoder_width: channels of the decoder's finest stage.
        feature_width: channels between each half and the latents; None: those of the
            coarsest stage of the encoder.
        patch_size: samples that are moved to channels first.
        num_heads: heads of an attention over the whole sound that follows the encoder;
            0: there is none.
        dtype: type of the computation.
    """

    sample_rate: int = 16_000
    channels: int = 1
    encoder_width: int = 64
    decoder_width: int = 64
    feature_width: int | None = None
    patch_size: int = 1
    num_heads: int = 0

    @property
    def hop(self) -> int:
        """Samples for each latent."""
        return self.patch_size * math.prod(self.strides)

    @property
    def latent_rate(self) -> float:
        """Latents per second."""
        return self.sample_rate / self.hop

    @property
    def margins(self) -> tuple[int, int]:
        """Latents on either side that the encoder looks at, and the decoder."""
        around = 3 * sum(self.dilations)
        seen = (_FEATURES - 1) // 2
        for stride in reversed(self.strides):
            seen = seen * stride + 2 * stride + around
        seen = (seen + (_ENDS - 1) // 2) * self.patch_size
        heard = (_ENDS - 1) // 2
        for stride in self.strides:
            heard = -(-(heard + around) // stride) + 2
        return -(-seen // self.hop), heard + (_ENDS - 1) // 2

    def length(self, samples: int) -> int:
        """How many latents hold so many samples; the last may reach past the end.

        Raises:
            ValueError: there is no sample.
        """
        if samples < 1:
            raise ValueError(f"`samples` (={samples}) must be at least 1.")
        return -(-samples // self.hop)

    def setup(self) -> None:
        """Builds both halves.

        Raises:
            ValueError: fields contradict one another.
        """
        if self.channels not in (1, 2):
            raise ValueError(f"`channels` (={self.channels}) must be 1 or 2.")
        shared = self.fields_of(WaveCoder)
        width = self.feature_width or self.encoder_width * 2 ** len(self.strides)
        wide = self.channels * self.patch_size
        self.encoder = WaveEncoder(width=self.encoder_width, features=width, **shared)
        self.decoder = WaveDecoder(width=self.decoder_width, features=wide, **shared)
        self.quant_conv = WaveConv(2 * self.latent_channels, taps=1, **self.types)
        self.post_quant_conv = WaveConv(width, taps=1, **self.types)
        if self.num_heads:
            self.attention = Attention(self.num_heads, qk_norm=False, **self.types)

    def features(self, audio: Float[Array, "b a e"]) -> Float[Array, "b n d"]:
        """What the encoder's convolutions say of a sound; `moments` is the rest of it.

        Args:
            audio: samples in [-1, 1], zeros being added to fill the last latent.

        Raises:
            ValueError: the sound has another number of channels.
        """
        if audio.shape[-1] != self.channels:
            raise ValueError(
                f"the sound has {audio.shape[-1]} channels but `channels` is "
                f"{self.channels}; mix it down, or repeat its one channel."
            )
        spare = self.length(audio.shape[1]) * self.hop - audio.shape[1]
        audio = jnp.pad(audio, ((0, 0), (0, spare), (0, 0)))
        patches = rearrange(audio, "b (n p) e -> b n (p e)", p=self.patch_size)
        return self.encoder(patches)

    def moments(
        self, features: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Mean and log variance of the latents of a whole sound, in float32."""
        if self.num_heads:
            features = self.attention(features, features)
        return moments_of(self.quant_conv(features))

    def encode(
        self, audio: Float[Array, "b a e"]
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Codes a sound as a normal distribution of latents, in float32.

        Args:
            audio: samples in [-1, 1], zeros being added to fill the last latent.

        Returns:
            Mean and log variance of each latent, not yet normalised (`normalize`).

        Raises:
            ValueError: the sound has another number of channels.
        """
        return self.moments(self.features(audio))

    def decode(self, latents: Float[Array, "b n c"]) -> Float[Array, "b a e"]:
        """Decodes latents (not normalised) to `hop` samples each, in [-1, 1], float32.

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels but `latent_channels` is "
                f"{self.latent_channels}; decode with the VAE that encoded them."
            )
        x = self.decoder(self.post_quant_conv(latents))
        return rearrange(x, "b n (p e) -> b (n p) e", p=self.patch_size)

    def __call__(
        self, audio: Float[Array, "b a e"]
    ) -> tuple[Float[Array, "b o e"], Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Encodes a sound and decodes the mean: (reconstruction, mean, logvar)."""
        mean, logvar = self.encode(audio)
        return self.decode(mean)[:, : audio.shape[1]], mean, logvar


VARIANTS: dict[str, dict[str, Any]] = {
    # For tests: every kind of layer, with as few parameters as that takes.
    "tiny": {
        "strides": (2, 3),
        "dilations": (1, 3),
        "encoder_width": 4,
        "decoder_width": 4,
        "latent_channels": 4,
        "patch_size": 2,
    },
    # The procedural world, trained on a CPU: 25 latents a second.
    "world": {
        "strides": (4, 5, 8),
        "encoder_width": 32,
        "decoder_width": 32,
        "latent_channels": 32,
        "patch_size": 4,
    },
    # KVAE-Audio of Kandinsky Lab (MIT): 48 kHz mono, 50 latents a second.
    "kvae-audio": {
        "strides": (2, 3, 4, 5, 8),
        "encoder_width": 64,
        "decoder_width": 48,
        "latent_channels": 64,
        "feature_width": 2048,
        "num_heads": 8,
        "sample_rate": 48_000,
    },
}
