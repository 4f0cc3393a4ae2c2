"""Pictures of clips for a page: posters, and previews of clips that are emerging."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from einops import reduce
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.ExifTags import Base

from jvdit.generation.results import STATEMENT

_SIDE = 256  # least pixels of the short side
_SMOOTH = Image.Resampling.BICUBIC
_SAMPLES = 6  # pictures of each sort from which colours are learned


def webp(
    frames: Sequence[UInt8[np.ndarray, "H W 3"]], milliseconds: float = 125.0
) -> bytes:
    """Frames as a picture, animated if there are several; small ones are enlarged.

    Args:
        frames: of one size.
        milliseconds: how long each is seen.
    """
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    scale = max(1.0, _SIDE / min(pictures[0].size))
    width, height = (round(n * scale) for n in pictures[0].size)
    pictures = [x.resize((width, height), _SMOOTH) for x in pictures]
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[Base.ImageDescription] = STATEMENT
    timing = {"duration": round(milliseconds), "loop": 0}
    more = {"exif": exif, "save_all": True, "append_images": pictures[1:], **timing}
    pictures[0].save(buffer, "webp", quality=80, method=0, **more)
    return buffer.getvalue()


class Colours:
    """The colours of latents, as a linear function of their channels.

    That costs next to nothing, for clips of any size, and shows what emerges.

    Args:
        encode: pixels in [-1, 1] `[T H W 3]` to normalised latents `[f h w c]`.
        height: of the pictures from which the function is found, in pixels.
        width: likewise.
    """

    def __init__(
        self, encode: Callable[[np.ndarray], np.ndarray], height: int, width: int
    ):
        rng, inputs, wanted = np.random.default_rng(0), [], []
        for grey in [False, True] * _SAMPLES:
            # Greys with edges: without them greys of clips would be seen in colour.
            rough = rng.integers(0, 256, (3, 3, 1) if grey else (5, 5, 3), np.uint8)
            rough = Image.fromarray(np.broadcast_to(rough, (*rough.shape[:2], 3)))
            way = Image.Resampling.NEAREST if grey else _SMOOTH
            drawn = np.asarray(rough.resize((width, height), way), np.float32)
            picture = drawn / 127.5 - 1
            (latents,) = encode(picture[None])
            sides = {"h": latents.shape[0], "w": latents.shape[1]}
            means = reduce(picture, "(h p) (w q) c -> h w c", "mean", **sides)
            inputs.append(_with_one(latents).reshape(-1, latents.shape[-1] + 1))
            wanted.append(means.reshape(-1, 3))
        self._weights = np.linalg.lstsq(
            np.concatenate(inputs), np.concatenate(wanted), rcond=1e-3
        )[0]

    def __call__(
        self, latents: Float[np.ndarray, "f h w c"]
    ) -> UInt8[np.ndarray, "f h w 3"]:
        """A small picture of each latent frame."""
        colours = _with_one(latents) @ self._weights
        return np.clip(colours * 127.5 + 127.5, 0, 255).astype(np.uint8)


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones((*latents.shape[:-1], 1))], axis=-1)
