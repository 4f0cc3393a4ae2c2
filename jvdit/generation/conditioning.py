"""What a clip is given besides its text: known frames and control signals, as tokens.

Networks take it in one of three ways. Wan 2.1 and 2.2 I2V: as channels beside the noise
(`first_frame_channels`). Wan 2.2 TI2V: as tokens that are clean (`clean_first_frame`).
VACE: as a control signal for blocks of their own (`control_signal`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8

from jvdit.data.packing import Item, Size, patchify, positions
from jvdit.generation.request import Request
from jvdit.models.dit import DiT
from jvdit.models.video_vae import VideoVAE
from jvdit.weights.conventions import Conventions

# Pixels in [-1, 1] [T H W 3] to normalised latents [f h w c].
Encode = Callable[[Float[np.ndarray, "T H W 3"]], Float[np.ndarray, "f h w c"]]


class Given(NamedTuple):
    """What is known of a clip, on the grid of its latents.

    Attributes:
        latents: of the tokens that are clean.
        clean: which cells are.
        cond: channels beside the noise.
        control: the signal for control blocks.
        image: states of an image encoder.
        lead: latent frames that come before the clip, and are cut off at the end.
    """

    latents: Float[np.ndarray, "f h w c"] | None = None
    clean: Bool[np.ndarray, "f h w"] | None = None
    cond: Float[np.ndarray, "f h w u"] | None = None
    control: Float[np.ndarray, "f h w v"] | None = None
    image: Float[np.ndarray, "i z"] | None = None
    lead: int = 0


def pictures_of(dit: DiT, conventions: Conventions) -> tuple[list[str], list[str]]:
    """Which pictures of a request a network needs, and which it takes."""
    if dit.control_channels:
        return [], ["video", "mask", "references"]
    if dit.image_length:
        return ["image", "last_image"], ["image", "last_image"]
    if dit.image_width:
        return ["image"], ["image"]
    if dit.cond_channels:
        return ["image"], ["image", "last_image"]
    return [], ["image"] * conventions.clean_frames


def check_pictures(request: Request, needed: list[str], takes: list[str]) -> None:
    """Raises ValueError if a request has other pictures than a network takes."""
    for name in request.given:
        if name not in takes:
            known = " and ".join(f"`{x}`" for x in takes) or "no pictures"
            raise ValueError(f"`{name}` was given, but this model takes {known}.")
    for name in needed:
        if name not in request.given:
            raise ValueError(f"this model needs `{name}`: give it a picture.")
    if "mask" in request.given and "video" not in request.given:
        raise ValueError("`mask` says what to keep of `video`; give both.")


def given_of(
    request: Request,
    size: tuple[int, int, int],
    dit: DiT,
    vae: VideoVAE,
    encode: Encode,
) -> Given:
    """What is known of a clip besides its text, in the form that a network takes.

    Args:
        request: that `check_pictures` let pass.
        size: latent frames, height and width.
        dit: the network.
        vae: of its latents.
        encode: pixels to normalised latents.
    """
    if dit.control_channels:
        return control_signal(
            request.clip("video"),
            request.clip("mask"),
            request.reference_pictures(),
            (request.frames, request.height, request.width),
            encode,
            vae.spatial_compression,
        )
    ends = [request.fitted(x) for x in request.pictures]
    if dit.cond_channels:
        return first_frame_channels(
            ends, request.frames, encode, vae.temporal_compression
        )
    return clean_first_frame(ends[0], size[0], encode) if ends else Given()


def to_pixels(pictures: UInt8[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """uint8 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1


def first_frame_channels(
    ends: Sequence[UInt8[np.ndarray, "H W 3"]],
    frames: int,
    encode: Encode,
    temporal_compression: int,
) -> Given:
    """A clip's first, and perhaps last, frame as channels beside the noise (Wan I2V).

    They are, for each latent frame, which of its pixel frames are given, and the
    latents of the clip that is grey where none is.
    """
    video = np.zeros((frames, *ends[0].shape), np.float32)
    known = np.zeros(frames, np.float32)
    for place, picture in zip((0, -1), ends, strict=False):
        video[place], known[place] = to_pixels(picture), 1
    latents = encode(video)
    f, h, w, _ = latents.shape
    known = np.concatenate([np.repeat(known[:1], temporal_compression), known[1:]])
    mask = repeat(known.reshape(f, -1), "f r -> f h w r", h=h, w=w)
    return Given(cond=np.concatenate([mask, latents], axis=-1))


def clean_first_frame(
    first: UInt8[np.ndarray, "H W 3"], frames: int, encode: Encode
) -> Given:
    """A given first frame as clean tokens; `frames` counts latent ones."""
    latent = encode(to_pixels(first)[None])
    latents = np.zeros((frames, *latent.shape[1:]), np.float32)
    clean = np.zeros(latents.shape[:3], bool)
    latents[0], clean[0] = latent[0], True
    return Given(latents=latents, clean=clean)


def control_signal(
    video: UInt8[np.ndarray, "T H W 3"] | None,
    mask: UInt8[np.ndarray, "T H W 3"] | None,
    references: Sequence[UInt8[np.ndarray, "H W 3"]],
    size: tuple[int, int, int],
    encode: Encode,
    spatial_compression: int,
) -> Given:
    """Footage, what to change of it, and pictures to show, for control blocks (VACE).

    Args:
        video: None: there is none, and everything is generated.
        mask: white where to generate; None: everywhere. A pixel of footage stays or
            goes whole, at half white; the network is shown the greys themselves.
        references: pictures at the clip's size; each is a latent frame before the clip.
        size: frames, height and width of the clip in pixels.
        encode: to latents.
        spatial_compression: pixels of a latent, along a side.
    """
    pixels = np.zeros((*size, 3), np.float32) if video is None else to_pixels(video)
    grey = np.ones(size, np.float32)
    if mask is not None:
        grey = mask[..., 0].astype(np.float32) / 255
    change = (grey > 0.5)[..., None]
    keep, new = encode(pixels * ~change), encode(pixels * change)
    side = {"p": spatial_compression, "q": spatial_compression}
    cells = rearrange(grey, "T (h p) (w q) -> T h w (p q)", **side)
    # The pixel frame in the middle of each latent one, as if they were evenly spread.
    middle = (np.arange(len(new)) + 0.5) * len(cells) / len(new)
    control = np.concatenate([keep, new, cells[middle.astype(int)]], axis=-1)
    for picture in references:
        latent = encode(to_pixels(picture)[None])
        blank = np.zeros((*latent.shape[:3], control.shape[-1] - latent.shape[-1]))
        lead = np.concatenate([latent, blank], axis=-1)
        control = np.concatenate([lead, control]).astype(np.float32)
    return Given(control=control, lead=len(references))


def item_of(
    request: Request,
    size: Size,
    known: Given,
    noise: Float[np.ndarray, "f h w c"] | None,
    states: Float[np.ndarray, "s e"],
    patch_size: Size,
    vae: VideoVAE,
    seconds: bool,
) -> Item:
    """A request in tokens, ready to be packed.

    Args:
        request: what to generate.
        size: latent frames, those of `known.lead` included, height and width.
        known: of the clip.
        noise: to start from; None: it is drawn later.
        states: of its text.
        patch_size: latent frames, height and width of a token.
        vae: of the latents.
        seconds: whether positions in time count seconds.
    """
    fps = request.fps if seconds else None
    latents = np.zeros((*size, vae.latent_channels), np.float32)
    if noise is not None:
        latents = np.asarray(noise, np.float32)
    extras = {
        name: patchify(value, patch_size)
        for name in ("cond", "control")
        if (value := getattr(known, name)) is not None
    }
    if known.clean is not None:
        latents = np.where(known.clean[..., None], known.latents, latents)
        extras["clean"] = patchify(known.clean[..., None], patch_size).all(axis=-1)
    return Item(
        patchify(latents, patch_size),
        positions(size, patch_size, fps, vae.temporal_compression),
        text_embeds=states,
        image=known.image,
        **extras,
    )


def with_clean(item: Item) -> Item:
    """The item with a mask of its clean tokens, if only to say that none is."""
    if item.clean is not None:
        return item
    return dataclasses.replace(item, clean=np.zeros(len(item.latents), bool))
