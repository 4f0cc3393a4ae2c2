"""Conditions that released networks of Wan take as channels beside the noise."""

import numpy as np
from einops import rearrange, repeat

from jvdit.data.conditions.known import Asked, Known, Place, to_pixels


def end_channels(request: Asked, place: Place) -> Known:
    """A clip's first, and perhaps last, frame as channels beside the noise (Wan I2V).

    They are, for each latent frame, which of its pixel frames are given, and the
    latents of the clip that is grey where none is.
    """
    video = np.zeros((*request.size, 3), np.float32)
    known = np.zeros(len(video), np.float32)
    for number, picture in zip((0, -1), request.ends, strict=False):
        video[number], known[number] = to_pixels(picture), 1
    latents = place.encode(video)
    f, h, w, _ = latents.shape
    first = np.repeat(known[:1], place.temporal_compression)
    known = np.concatenate([first, known[1:]]).reshape(f, -1)
    mask = repeat(known, "f r -> f h w r", h=h, w=w)
    return Known(cond=np.concatenate([mask, latents], axis=-1))


def control_signal(request: Asked, place: Place) -> Known:
    """Footage, what to change of it, and pictures to show, for control blocks (VACE).

    Without a video everything is generated. The mask is white where to generate; none:
    everywhere. A pixel of footage stays or goes whole, at half white; the network is
    shown the greys themselves. Each reference is a latent frame before the clip.
    """
    video, mask = request.clip("video"), request.clip("mask")
    references = request.reference_pictures()
    shape = *request.size, 3
    pixels = np.zeros(shape, np.float32) if video is None else to_pixels(video)
    grey = np.ones(request.size, np.float32)
    if mask is not None:
        grey = mask[..., 0].astype(np.float32) / 255
    change = (grey > 0.5)[..., None]
    keep, new = place.encode(pixels * ~change), place.encode(pixels * change)
    side = dict.fromkeys(("p", "q"), place.spatial_compression)
    cells = rearrange(grey, "T (h p) (w q) -> T h w (p q)", **side)
    # The pixel frame in the middle of each latent one, as if they were evenly spread.
    middle = (np.arange(len(new)) + 0.5) * len(cells) / len(new)
    control = np.concatenate([keep, new, cells[middle.astype(int)]], axis=-1)
    for picture in references:
        latent = place.encode(to_pixels(picture)[None])
        blank = np.zeros((*latent.shape[:3], control.shape[-1] - latent.shape[-1]))
        lead = np.concatenate([latent, blank], axis=-1)
        control = np.concatenate([lead, control]).astype(np.float32)
    return Known(control=control, lead=len(references))
