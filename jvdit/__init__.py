"""JAX Video DiT: a latent diffusion transformer for video, whole.

Names are loaded when they are first used, because workers that read data import this
package too and must not load jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jvdit.data.world import World as World
    from jvdit.diffusion.denoise import Guidance as Guidance
    from jvdit.diffusion.noise_path import NoisePath as NoisePath
    from jvdit.diffusion.noise_path import TimestepPolicy as TimestepPolicy
    from jvdit.generation.generator import Generator as Generator
    from jvdit.generation.request import Request as Request
    from jvdit.generation.results import GeneratedClip as GeneratedClip
    from jvdit.models.audio_vae import AudioVAE as AudioVAE
    from jvdit.models.dit import DiT as DiT
    from jvdit.models.image_encoder import ImageEncoder as ImageEncoder
    from jvdit.models.text_encoder import TextEncoder as TextEncoder
    from jvdit.models.video_vae import VideoVAE as VideoVAE
    from jvdit.shapes import Text as Text
    from jvdit.shapes import Tokens as Tokens

_HOMES = {
    "AudioVAE": "jvdit.models.audio_vae",
    "DiT": "jvdit.models.dit",
    "GeneratedClip": "jvdit.generation.results",
    "Generator": "jvdit.generation.generator",
    "Guidance": "jvdit.diffusion.denoise",
    "ImageEncoder": "jvdit.models.image_encoder",
    "NoisePath": "jvdit.diffusion.noise_path",
    "Request": "jvdit.generation.request",
    "Text": "jvdit.shapes",
    "TextEncoder": "jvdit.models.text_encoder",
    "TimestepPolicy": "jvdit.diffusion.noise_path",
    "Tokens": "jvdit.shapes",
    "VideoVAE": "jvdit.models.video_vae",
    "World": "jvdit.data.world",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"jvdit has no {name!r}; it has {', '.join(_HOMES)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
