"""Causal video autoencoder: frames to a small grid of latents, and back.

The first frame is coded alone and every following group of `temporal_compression`
frames adds one latent frame, so an image is a video of one frame and no latent depends
on later pixels. The Wan 2.1 and 2.2 VAEs (Wan team 2025, arXiv:2503.20314, section 4.1)
and our own are rows of one table, `VARIANTS`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from jvdit.models.convolution import Convolution
from jvdit.models.latents import Autoencoder, moments_of
from jvdit.models.video_vae_stages import REMAT, Coder, Decoder, Encoder
from jvdit.sharding import constrain, frame_axes


class VideoVAE(Coder, Autoencoder):
    """Variational autoencoder of videos and images.

    Attributes:
        encoder_width: channels of the encoder's finest stage.
        decoder_width: channels of the decoder's finest stage.
        multipliers: width of each stage in units of the base width, fine to coarse.
        num_res_blocks: residual blocks of an encoder stage; the decoder has one more.
        spatial_downsample: whether height and width are halved between each stage and
            the next; None: always.
        temporal_downsample: whether the frames are halved there.
        stage_taps: time taps of each stage's kernels, fine to coarse; None: 3.
        patch_size: side of the squares of pixels that are moved to channels first.
        residual_shortcuts: average or repeat around each stage (Wan 2.2).
        middle_attention: attention within frames at the coarsest resolution.
        norm_eps: added to the mean square that a norm divides by.
        remat: what the backward pass recomputes: "none", "full" (residual blocks) or
            "dots" (residual blocks, but for products and convolutions).
        dtype: type of the computation; norms and softmax are float32 always.
    """

    encoder_width: int = 96
    decoder_width: int = 96
    patch_size: int = 1

    @property
    def temporal_compression(self) -> int:
        """Frames for each latent frame after the first."""
        return 2 ** sum(map(bool, self.temporal_downsample))

    @property
    def spatial_compression(self) -> int:
        """Pixels of height, or of width, for each latent."""
        return self.patch_size * 2 ** sum(map(bool, self.spatial))

    def latent_shape(self, T: int, H: int, W: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video of T x H x W pixels.

        Raises:
            ValueError: the sizes are not whole numbers of latents.
        """
        time, space = self.temporal_compression, self.spatial_compression
        if T < 1 or (T - 1) % time:
            below = max(1 + (T - 1) // time * time, 1)
            raise ValueError(
                f"frames `T` (={T}) must be 1 plus a multiple of the temporal "
                f"compression (={time}); try {below} or {below + time}."
            )
        for name, size in (("height `H`", H), ("width `W`", W)):
            if size < 1 or size % space:
                nearest = max(round(size / space), 1) * space
                raise ValueError(
                    f"{name} (={size}) must be divisible by the spatial compression "
                    f"(={space}); try {nearest}."
                )
        return 1 + (T - 1) // time, H // space, W // space

    def video_shape(self, f: int, h: int, w: int) -> tuple[int, int, int]:
        """Frames, height and width in pixels of f x h x w latents."""
        space = self.spatial_compression
        return 1 + self.temporal_compression * (f - 1), h * space, w * space

    def setup(self) -> None:
        """Builds both halves.

        Raises:
            ValueError: fields contradict one another.
        """
        stages = len(self.multipliers)
        for name, given, entries in (
            ("spatial_downsample", self.spatial, stages - 1),
            ("temporal_downsample", self.temporal_downsample, stages - 1),
            ("stage_taps", self.taps, stages),
        ):
            if len(given) != entries:
                each = "" if entries == stages else f"{entries} halvings of "
                raise ValueError(
                    f"`{name}` (={given}) must have one entry for each of the "
                    f"{each}{stages} `multipliers`."
                )
        if self.remat not in REMAT:
            raise ValueError(
                f"`remat` (={self.remat!r}) must be one of {tuple(REMAT)}."
            )
        shared, moments = self.fields_of(Coder), 2 * self.latent_channels
        pixels = 3 * self.patch_size**2
        self.encoder = Encoder(width=self.encoder_width, out_channels=moments, **shared)
        self.decoder = Decoder(width=self.decoder_width, out_channels=pixels, **shared)
        self.quant_conv = Convolution(moments, (1, 1, 1), **self.types)
        self.post_quant_conv = Convolution(
            self.latent_channels, (1, 1, 1), **self.types
        )

    def encode(
        self, video: Float[Array, "b T H W 3"]
    ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
        """Codes a video as a normal distribution of latents, in float32.

        Args:
            video: pixels in [-1, 1]: 1 + `temporal_compression` k frames, or without
                the 1 where it continues another (`video_vae_chunked`).

        Returns:
            Mean and log variance of each latent, not yet normalised (`normalize`).

        Raises:
            ValueError: the sizes are not whole numbers of latents.
        """
        continues = "encoder" in self.variables.get("cache", {})
        frames = video.shape[1] + continues
        self.latent_shape(frames, *video.shape[2:4])
        p = self.patch_size
        x = rearrange(video, "b f (h r) (w q) c -> b f h w (c q r)", r=p, q=p)
        x = constrain(x, *frame_axes(x))
        return moments_of(self.quant_conv(self.encoder(x)))

    def decode(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b T H W 3"]:
        """Decodes latents (not normalised) to pixels, in float32.

        Returns:
            Pixels, nominally in [-1, 1] but not clipped, for the sake of gradients.

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[-1]} channels but `latent_channels` is "
                f"{self.latent_channels}; decode with the VAE that encoded them."
            )
        latents = constrain(latents, *frame_axes(latents))
        x = self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)
        p = self.patch_size
        return rearrange(x, "b f h w (c q r) -> b f (h r) (w q) c", r=p, q=p)

    def __call__(
        self, video: Float[Array, "b T H W 3"]
    ) -> tuple[
        Float[Array, "b T H W 3"], Float[Array, "b f h w c"], Float[Array, "b f h w c"]
    ]:
        """Encodes a video and decodes the mean: (reconstruction, mean, logvar)."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar


def to_float(video: Array | np.ndarray) -> Float[Array, "b T H W 3"]:
    """uint8 pixels to [-1, 1]."""
    return jnp.asarray(video).astype(jnp.float32) / 127.5 - 1


def to_uint8(video: Float[Array, "b T H W 3"]) -> Array:
    """[-1, 1] to uint8 pixels, rounded and clipped."""
    return jnp.round(jnp.clip(video * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


VARIANTS: dict[str, dict[str, Any]] = {
    # For tests: every kind of layer, with as few parameters as that takes.
    "tiny": {
        "encoder_width": 4,
        "decoder_width": 4,
        "multipliers": (1, 1, 2),
        "num_res_blocks": 1,
        "temporal_downsample": (True, True),
        "latent_channels": 4,
        "patch_size": 2,
        "residual_shortcuts": True,
    },
    # The procedural world, trained on a CPU: objects are few pixels wide, so that 4 x 4
    # of them in two frames make a latent. The finest stage works within frames.
    "world": {
        "encoder_width": 32,
        "decoder_width": 48,
        "multipliers": (1, 2),
        "num_res_blocks": 1,
        "temporal_downsample": (True,),
        "stage_taps": (1, 3),
        "latent_channels": 12,
        "patch_size": 2,
        "residual_shortcuts": True,
        "norm_eps": 1e-6,
    },
    # Clips of one's own, on a CPU: half as many latents.
    "clips": {
        "encoder_width": 24,
        "decoder_width": 24,
        "multipliers": (1, 2, 2),
        "num_res_blocks": 1,
        "spatial_downsample": (True, False),
        "temporal_downsample": (True, True),
        "stage_taps": (1, 3, 3),
        "latent_channels": 16,
        "patch_size": 2,
        "residual_shortcuts": True,
        "norm_eps": 1e-6,
    },
    "wan2.1": {
        "latents_mean": _numbers(
            "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 "
            "-0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"
        ),
        "latents_std": _numbers(
            "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 "
            "2.8652 1.5579 1.6382 1.1253 2.8251 1.916"
        ),
    },
    "wan2.2": {
        "encoder_width": 160,
        "decoder_width": 256,
        "latent_channels": 48,
        "patch_size": 2,
        "residual_shortcuts": True,
        "latents_mean": _numbers(
            "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 "
            "0.0542 0.2813 0.0891 0.157 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 "
            "-0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 "
            "0.1567 -0.0729 0.0899 -0.2799 -0.123 -0.0313 -0.1649 0.0117 0.0723 "
            "-0.2839 -0.2083 -0.052 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 "
            "-0.0548 -0.1681 -0.0667"
        ),
        "latents_std": _numbers(
            "0.4765 1.0364 0.4514 1.1677 0.5313 0.499 0.4818 0.5013 0.8158 1.0344 "
            "0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 "
            "0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 "
            "0.6866 0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 "
            "0.3971 1.06 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744"
        ),
    },
}
