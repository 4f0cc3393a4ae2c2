"""Critics, which tell real clips from an autoencoder's reconstructions of them.

A critic judges patches rather than whole clips (arXiv:1611.07004, section 3.2.2), as a
reconstruction is wrong in its textures, not in what it shows. Nothing in it mixes the
clips of a batch, so the judgement of a clip depends on that clip alone.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution
from jvdit.models.dense import Layer
from jvdit.models.stft import stft

# The logits of patches, above 0 where they look real, and the features of each layer.
Judgement = tuple[list[Array], list[Array]]


class PictureCritic(Layer):
    """A discriminator of patches in space and time; an image is a one-frame video.

    Every layer halves height and width, and looks back at two frames.

    Attributes:
        width: channels of the first layer; each layer has twice those of the last.
        depth: how many layers come before the logits. With 3, a patch is 38 pixels
            wide and 7 frames long.
    """

    width: int = 32
    depth: int = 3

    @nn.compact
    def __call__(self, video: Float[Array, "b T H W 3"]) -> Judgement:
        """Judges videos with pixels in [-1, 1]."""
        x, features = video, []
        for i in range(self.depth):
            shape = self.width * 2**i, (3, 4, 4), (1, 2, 2)
            x = _leaky(Convolution(*shape, name=f"conv_{i}", **self.types)(x))
            features.append(x)
        logits = Convolution(1, (3, 3), name="conv_out", **self.types)(x)
        return [logits], features


class SoundCritic(Layer):
    """A discriminator of complex spectra at several resolutions.

    It is that of EnCodec (arXiv:2210.13438, section 3.4), but that its layers reach far
    in time by strides, which cost less than dilation.

    Attributes:
        width: channels of every layer.
        depth: how many layers of each resolution come before its logits. Each halves
            the frequencies, and all but the first halve the windows.
        windows: samples of the windows of each resolution, multiples of 4.
    """

    width: int = 16
    depth: int = 3
    windows: Sequence[int] = (128, 512, 2048)

    @nn.compact
    def __call__(self, audio: Float[Array, "b a e"]) -> Judgement:
        """Judges sounds with samples in [-1, 1].

        Raises:
            ValueError: a window is no multiple of 4.
        """
        logits, features = [], []
        for window in self.windows:
            if window < 4 or window % 4:
                raise ValueError(
                    f"`windows` (={self.windows}) must be multiples of 4; try "
                    f"{max(round(window / 4), 1) * 4} for {window}."
                )
            # White noise gets the amplitude of its samples, whatever the window.
            spectrum = stft(audio, window) * math.sqrt(window / 6)
            x = jnp.concatenate([spectrum.real, spectrum.imag], axis=-1)
            x = rearrange(x, "b n f c -> b 1 n f c")
            for i in range(self.depth):
                shape = self.width, (3, 9), (1, 1 if i == 0 else 2, 2)
                name = f"window_{window}_conv_{i}"
                x = _leaky(Convolution(*shape, name=name, **self.types)(x))
                features.append(x)
            name = f"window_{window}_conv_out"
            logits.append(Convolution(1, (3, 3), name=name, **self.types)(x))
        return logits, features


def _leaky(x: Array) -> Array:
    """A leaky ReLU that keeps the variance of what comes in."""
    return nn.leaky_relu(x, 0.2) * math.sqrt(2 / (1 + 0.2**2))
