"""Latents to tokens and back: a token is a patch of latents, at its position."""

import functools

import numpy as np
from einops import rearrange
from jaxtyping import Float, Shaped

# Patch sizes and latent grids are (frames, height, width).
Size = tuple[int, int, int]
Latents = Shaped[np.ndarray, "f h w c"]
Patches = Shaped[np.ndarray, "n p"]

# Patches of pt x ph x pw latents, as einops has it.
_LATENTS, _TOKENS = "(f pt) (h ph) (w pw) c", "(f h w) (pt ph pw c)"


def token_grid(latent_size: Size, patch_size: Size) -> Size:
    """Returns how many tokens a latent grid gives along each axis.

    Raises:
        ValueError: a side is no positive multiple of its patch.
    """
    sides = zip(("frames", "height", "width"), latent_size, patch_size, strict=True)
    for name, size, patch in sides:
        if size < 1 or size % patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"Latent {name} (={size}) must be a positive multiple of the patch "
                f"(={patch}); try {near}."
            )
    f, h, w = (s // p for s, p in zip(latent_size, patch_size, strict=True))
    return f, h, w


def patchify(latents: Latents, patch_size: Size) -> Patches:
    """Cuts the latents of one clip into patches; a patch is one token.

    Tokens are in the order of (frame, height, width), the last fastest. The channels of
    a token are in the order of (frame, height, width, channel) within the patch, as the
    kernel of a channels-last strided convolution has them.
    """
    token_grid(latents.shape[:3], patch_size)
    patch = dict(zip(("pt", "ph", "pw"), patch_size, strict=True))
    return rearrange(latents, f"{_LATENTS} -> {_TOKENS}", **patch)


def unpatchify(tokens: Patches, latent_size: Size, patch_size: Size) -> Latents:
    """Puts the patches of one clip together again; undoes `patchify`."""
    f, h, w = token_grid(latent_size, patch_size)
    if tokens.shape[0] != f * h * w:
        raise ValueError(
            f"Latents of size {latent_size} in patches of {patch_size} are {f * h * w} "
            f"tokens, and {tokens.shape[0]} were given."
        )
    patch = dict(zip(("pt", "ph", "pw"), patch_size, strict=True))
    return rearrange(tokens, f"{_TOKENS} -> {_LATENTS}", f=f, h=h, **patch)


def latent_times(
    frames: int, fps: float, temporal_compression: int, first: int = 0
) -> Float[np.ndarray, "f"]:
    """Returns the time of each latent frame of a causal VAE, in seconds.

    They are counted from `first`.

    Latent frame 0 is pixel frame 0 alone, and latent frame i > 0 covers the pixel
    frames from `temporal_compression * (i - 1) + 1` to `temporal_compression * i`; its
    time is the middle of those.
    """
    if not fps > 0:
        raise ValueError(f"`fps` (={fps}) must be positive.")
    i = np.arange(first, first + frames)
    middle = temporal_compression * (i - 1) + (temporal_compression + 1) / 2
    return np.where(i == 0, 0.0, middle) / fps


@functools.lru_cache(maxsize=1024)
def positions(
    latent_size: Size,
    patch_size: Size,
    fps: float | None,
    temporal_compression: int,
    first: int = 0,
) -> Float[np.ndarray, "n 3"]:
    """Returns the (t, y, x) coordinates of the tokens of one clip.

    Args:
        latent_size: latent frames, height and width.
        patch_size: latent frames, height and width of a patch.
        fps: pixel frames per second of the clip. None: t counts tokens like y and x, as
            imported models do.
        temporal_compression: pixel frames that a latent frame after the first covers.
        first: number of the first latent frame; 1 of a clip that begins amid another.

    Returns:
        t in seconds, the mean over the latent frames of the patch, so that clips of
        different frame rates share one clock; y and x in patches, so that neighbouring
        tokens differ by 1. float32, in the order of `patchify`; not to be written to,
        for clips of a size share it.
    """
    f, h, w = token_grid(latent_size, patch_size)
    if fps is None:
        t = first / patch_size[0] + np.arange(f, dtype=np.float64)
    else:
        times = latent_times(latent_size[0], fps, temporal_compression, first)
        t = rearrange(times, "(f pt) -> f pt", f=f).mean(axis=1)
    position = _grid(t, np.arange(h), np.arange(w))
    position.flags.writeable = False
    return position


def part_positions(
    latent_size: Size, patch_size: Size, times: Float[np.ndarray, "f"], cell: int
) -> Float[np.ndarray, "n 3"]:
    """Returns the (t, y, x) coordinates of tokens that lie beside those of a clip.

    Args:
        latent_size: latent frames, height and width of what lies there.
        patch_size: latent frames, height and width of a patch; one frame.
        times: t of each latent frame.
        cell: side of its cells, in cells of the clip.
    """
    _, h, w = token_grid(latent_size, patch_size)
    # The middle of each token, in the clip's tokens.
    y, x = ((np.arange(n) + 0.5) * cell - 0.5 for n in (h, w))
    return _grid(times, y, x)


def _grid(t: np.ndarray, y: np.ndarray, x: np.ndarray) -> Float[np.ndarray, "n 3"]:
    grid = np.meshgrid(t, y, x, indexing="ij")
    return rearrange(np.stack(grid), "a f h w -> (f h w) a").astype(np.float32)


def frame_clock(
    times: Float[np.ndarray, "n"], fps: float, temporal_compression: int
) -> Float[np.ndarray, "n"]:
    """Seconds in latent frames: the inverse of `latent_times`.

    Before the first frame ends it isn't one; there a latent frame is as long as it is
    after that.
    """
    late = (times * fps + (temporal_compression - 1) / 2) / temporal_compression
    return np.where(times > 0, late, times * fps / temporal_compression)


def sound_positions(
    count: int,
    rate: float,
    fps: float | None,
    temporal_compression: int,
    late: float = 0.0,
) -> Float[np.ndarray, "n 3"]:
    """Returns the (t, y, x) coordinates of the tokens of a sound.

    Args:
        count: latents.
        rate: latents per second.
        fps: of the clip whose positions in time count latent frames, so that both kinds
            share its clock. None: t is in seconds.
        temporal_compression: pixel frames that a latent frame after the first covers.
        late: seconds after which the sound begins.

    Returns:
        t at the middle of each token; y and x are 0.
    """
    position = np.zeros((count, 3), np.float32)
    t = late + (np.arange(count) + 0.5) / rate
    position[:, 0] = t if fps is None else frame_clock(t, fps, temporal_compression)
    return position


def grid_frames(position: Float[np.ndarray, "b n 3"]) -> int:
    """How many frames every row has, if each is one grid; 0: they aren't, or differ.

    Args:
        position: of the tokens of one clip a row. A grid has them frame after frame,
            later ones later in time, each of the same cells in the same order.
    """
    frames = len(np.unique(position[0, :, 0]))
    if position.shape[1] % frames:
        return 0
    grid = rearrange(position, "b (f s) a -> b f s a", f=frames)
    t, cells = grid[..., 0], grid[..., 1:]
    alike = (t == t[:, :, :1]).all() and (cells == cells[:, :1]).all()
    return frames if alike and (np.diff(t[:, :, 0]) > 0).all() else 0
