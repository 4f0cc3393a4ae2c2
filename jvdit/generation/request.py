"""What to generate: a prompt, a size, and the pictures that a clip is to follow."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jvdit.data.media.reader import decode_clip

# A file, or pixels: uint8 [H W 3], of a video [T H W 3].
Pictures = str | os.PathLike[str] | np.ndarray

_SMOOTH = Image.Resampling.LANCZOS
# Of each colour in [0, 1], over the pictures that CLIP was trained with.
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

PICTURES = ("image", "last_image", "video", "mask")
# What a request is completed with where its model says nothing.
_SUITS = {"negative_prompt": "", "frames": 17, "height": 64, "width": 64, "fps": 8.0}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate. Fields that are None are as suits the model (`complete`).

    Pictures of another size are scaled to cover the clip's and cropped. Which of them a
    model takes is a matter of its training (`Generator.check`).

    Attributes:
        prompt: what the clip shows.
        negative_prompt: what guidance turns away from.
        frames, height, width: of the clip, in pixels. With a first frame and neither
            height nor width, the clip has the proportions of the picture.
        fps: frames per second of the clip.
        seed: of its noise; the same seed gives the same clip whatever else is
            generated along with it.
        image: its first frame.
        last_image: its last frame.
        video: what it follows or goes on from: a control signal (depth, pose, …) or
            footage, of which `mask` says what to keep.
        mask: white where to generate, black where `video` is kept; None: all white.
        references: pictures of what is to appear.
    """

    prompt: str
    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    image: Pictures | None = None
    last_image: Pictures | None = None
    video: Pictures | None = None
    mask: Pictures | None = None
    references: tuple[Pictures, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels.

        Raises:
            ValueError: they were left to a model; `complete` asks it.
        """
        if self.frames is None or self.height is None or self.width is None:
            raise ValueError("this request leaves its size to a model; complete it.")
        return self.frames, self.height, self.width

    @property
    def given(self) -> list[str]:
        """The names of the pictures that it has."""
        names = [name for name in PICTURES if getattr(self, name) is not None]
        return names + ["references"] * bool(self.references)

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields as JSON values; pictures by their file, or their shape."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        fields |= {name: _named(fields[name]) for name in PICTURES}
        fields["references"] = [_named(x) for x in self.references]
        return {k: v for k, v in fields.items() if v is not None and v != []}

    @property
    def pictures(self) -> list[np.ndarray]:
        """Its first and last frame as uint8 `[H W 3]`, of the sizes that they have."""
        ends = (("image", self.image), ("last_image", self.last_image))
        return [_picture(x, name) for name, x in ends if x is not None]

    @property
    def ends(self) -> list[np.ndarray]:
        """The same, at the size of the clip."""
        return [self.fitted(x) for x in self.pictures]

    def fitted(self, picture: np.ndarray) -> np.ndarray:
        """A picture at the size of the clip."""
        _, height, width = self.size
        if picture.shape[:2] == (height, width):
            return picture
        size = width, height
        return np.asarray(ImageOps.fit(Image.fromarray(picture), size, _SMOOTH))

    def clip(self, name: str) -> np.ndarray | None:
        """`video` or `mask` as uint8 `[T H W 3]`, at the size of the clip.

        Raises:
            ValueError: it has fewer frames.
        """
        source = getattr(self, name)
        if source is None:
            return None
        frames, height, width = self.size
        if isinstance(source, np.ndarray):
            _check(source, 4, name)
            if len(source) < frames:
                raise ValueError(
                    f"`{name}` has {len(source)} frames and the clip {frames}; "
                    f"give at least as many, or ask for {len(source)}."
                )
            return np.stack([self.fitted(x) for x in source[:frames]])
        if not pathlib.Path(source).exists():
            raise FileNotFoundError(f"`{name}` (={source}) doesn't exist.")
        size = {"frames": frames, "height": height, "width": width}
        return decode_clip(os.fspath(source), fps=self.fps, **size)["video"]

    def reference_pictures(self) -> list[np.ndarray]:
        """`references` as uint8 `[H W 3]`, each whole, on white, at the clip's size."""
        _, height, width = self.size
        return [
            _on_white(_picture(x, "references"), height, width) for x in self.references
        ]


def complete(request: Request, defaults: Mapping[str, Any], unit: int) -> Request:
    """The request with every field that it left open.

    Args:
        request: what is wanted.
        defaults: fields that suit the model.
        unit: what height and width are multiples of, in pixels.
    """
    suits = _SUITS | {k: v for k, v in defaults.items() if k in _SUITS}
    open_fields = [name for name in _SUITS if getattr(request, name) is None]
    fields = {name: suits[name] for name in open_fields}
    if request.image is not None and {"height", "width"} <= set(open_fields):
        picture, pixels = request.pictures[0], suits["height"] * suits["width"]
        fields["height"], fields["width"] = size_like(picture, pixels, unit)
    return dataclasses.replace(request, **fields)


def size_fields(
    defaults: dict[str, Any], size: str | None, frames: int | None, fps: float | None
) -> dict[str, Any]:
    """Fields of a `Request` that say how large a clip is.

    Args:
        defaults: of the model.
        size: "HEIGHTxWIDTH" in pixels, or None: the model's, as for the others.
        frames: of the clip.
        fps: frames per second.

    Raises:
        ValueError: the size reads otherwise.
    """
    names = ("frames", "height", "width", "fps")
    fields = {name: defaults[name] for name in names if name in defaults}
    if size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise ValueError(
                f"`size` (={size!r}) must read HEIGHTxWIDTH, such as 64x96."
            )
        fields |= {"height": int(match[1]), "width": int(match[2])}
    given = {"frames": frames, "fps": fps}
    return fields | {name: value for name, value in given.items() if value is not None}


def size_like(picture: np.ndarray, pixels: int, unit: int) -> tuple[int, int]:
    """Height and width in the proportions of a picture, of about so many pixels.

    Args:
        picture: uint8 `[H W 3]`.
        pixels: height times width, at the most.
        unit: what both are multiples of.
    """
    aspect = picture.shape[0] / picture.shape[1]
    height, width = (pixels * aspect) ** 0.5, (pixels / aspect) ** 0.5
    sides = [max(int(x + 1e-6) // unit, 1) * unit for x in (height, width)]
    return sides[0], sides[1]


def for_encoder(
    picture: UInt8[np.ndarray, "H W 3"], side: int
) -> Float[np.ndarray, "S S 3"]:
    """A picture as CLIP takes it, as transformers' CLIPImageProcessor prepares it.

    The shorter side is resized to `side`, what the longer one has too much is cut off
    at both ends, and colours are standardised. (Wan's own code squeezes the whole
    picture into the square instead; diffusers does as here.)
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    size = side * width // short, side * height // short
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = ((x - side) // 2 for x in size)
    square = np.asarray(image, np.float32)[top : top + side, left : left + side] / 255
    return (square - _CLIP_MEAN) / _CLIP_STD


def _picture(source: Pictures, name: str) -> np.ndarray:
    if isinstance(source, np.ndarray):
        _check(source, 3, name)
        return source
    try:
        with Image.open(source) as image:
            return np.asarray(_eight_bits(ImageOps.exif_transpose(image), name))
    except FileNotFoundError:
        raise FileNotFoundError(f"`{name}` (={source}) doesn't exist.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"`{name}` (={source}) is no picture: {error}.") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """An RGB picture of 8 bits; Pillow cuts off what is above 255 of others."""
    if image.mode[0] in "IF":
        values = np.asarray(image, np.float32)
        most = 65535.0 if image.mode[0] == "I" else 1.0 if values.max() <= 1 else 255.0
        if not (values.min() >= 0 and values.max() <= most):
            raise ValueError(
                f"`{name}` has values from {values.min():g} to {values.max():g}; "
                "save it with 8 or 16 bits, or as floats in [0, 1]."
            )
        image = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
    return image.convert("RGB")


def _on_white(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    size = width, height
    whole = ImageOps.pad(Image.fromarray(picture), size, _SMOOTH, color="white")
    return np.asarray(whole)


def _check(pixels: np.ndarray, ndim: int, name: str) -> None:
    if pixels.ndim != ndim or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        wanted = "[T H W 3]" if ndim == 4 else "[H W 3]"
        raise ValueError(
            f"`{name}` is {pixels.dtype} {list(pixels.shape)}; give uint8 {wanted}."
        )


def _named(source: Pictures | None) -> str | None:
    if isinstance(source, np.ndarray):
        return f"pixels {'x'.join(map(str, source.shape))}"
    return None if source is None else os.fspath(source)
