"""Checks that a model can generate what a request asks for."""

import numpy as np

from jvdit.data.patches import Size
from jvdit.generation.request import STATES, Request
from jvdit.weights.bundle import Bundle


def check_request(model: Bundle, request: Request) -> Size:
    """Checks that a model can generate a complete request.

    Returns:
        The latent frames, height and width of its clip.

    Raises:
        ValueError: the model can't generate this size, or doesn't take what the
            request gives.
    """
    size = _latent_size(model, request)
    for name in STATES:
        _check_states(model, name, getattr(request, name))
    # Footage to restyle is no condition: any model begins with what it is given.
    model.check_given([x for x in request.given if x != "restyle"])
    if request.sound:
        model.audio_vae  # noqa: B018 - raises if there is none
    elif request.from_video is not None or request.from_sound is not None:
        raise ValueError(
            "`from_video` and `from_sound` need sound, and `sound` is False."
        )
    return size


def _latent_size(model: Bundle, request: Request) -> Size:
    """The size of a request's clip in latents, which whole patches make up."""
    size = model.vae.latent_shape(*request.size)
    pairs = [*zip(size, model.patch_size, strict=True)]
    whole = [max(round(n / p), 1) * p for n, p in pairs]
    nearest = model.vae.video_shape(*whole)
    for i, name in enumerate(("frames", "height", "width")):
        if size[i] % model.patch_size[i]:
            raise ValueError(
                f"`{name}` (={request.size[i]}) makes {size[i]} latents, which "
                f"patches of {model.patch_size[i]} don't divide; try {nearest[i]}."
            )
    return size


def _check_states(model: Bundle, name: str, states: np.ndarray | None) -> None:
    """Raises a ValueError if the model can't take these text states."""
    width, most = model.dit.text_width, model.text_length
    if states is None:
        return
    if states.ndim != 2 or states.shape[1] != width or not len(states) <= most:
        raise ValueError(
            f"`{name}` is {[*states.shape]}; give [s {width}] with at most {most} "
            "states, without a batch axis."
        )
    if not np.isfinite(states).all():
        raise ValueError(f"`{name}` holds values that aren't finite.")
