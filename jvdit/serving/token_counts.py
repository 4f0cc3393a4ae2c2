"""How many tokens a clip takes of a row, with what is given beside it."""

import math

from jvdit.data.patches import token_grid
from jvdit.generation.footage import FOOTAGE, footage_length
from jvdit.generation.request import Request
from jvdit.weights.bundle import Bundle


def clip_tokens(model: Bundle, frames: int, height: int, width: int) -> int:
    """Tokens of the picture of a clip.

    Raises:
        ValueError: the autoencoder or the patches don't divide this size.
    """
    size = model.vae.latent_shape(frames, height, width)
    return math.prod(token_grid(size, model.patch_size))


def picture_tokens(
    model: Bundle,
    request: Request,
    size: tuple[int, int, int] | None = None,
    stills: int | None = None,
) -> int:
    """Tokens of the picture of a complete request, and of what is given beside it.

    Args:
        model: that makes it.
        request: the request.
        size: frames, height and width, if not the request's own.
        stills: what `stills_of` says, if that is known.

    Raises:
        ValueError: what is given doesn't go with this size; names it.
    """
    frames, height, width = size = size or request.size
    count = clip_tokens(model, *size)
    stills = stills_of(model, request) if stills is None else stills
    if stills:
        count += stills * clip_tokens(model, 1, height, width)
    for name in ("interpolate", "upscale"):
        if getattr(request, name) is None:
            continue
        row = FOOTAGE[name]
        sides = height // row.smaller, width // row.smaller
        try:
            count += clip_tokens(model, 1 + (frames - 1) // row.slower, *sides)
        except ValueError as error:
            raise ValueError(
                f"`{name}` doesn't go with {frames} frames of {width}x{height}: {error}"
            ) from None
    return count


def stills_of(model: Bundle, request: Request) -> int:
    """How many pictures of a clip's size are given beside it, each by itself."""
    ends = 1 if request.last_image is not None else 0
    if request.suffix is not None:
        ends = footage_length(request.suffix, "suffix", request.frame_rate)
    many = {
        "suffix": ends,
        "keyframes": len(request.keyframes),
        "reference": len(request.references),
    }
    return sum(n for name, n in many.items() if name in model.conditions)
