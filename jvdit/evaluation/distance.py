"""Compares sets of clips: copies of training clips, and the Fréchet distance."""

import numpy as np
from jaxtyping import Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view

_FRAMES, _CELLS = 5, 8  # frames of a thumbnail, and cells along its height and width
_KERNEL, _STRIDE, _FILTERS = (5, 7, 7), (2, 4, 4), 96
_CHANGE = 4.0  # factor on the responses to change

Clips = UInt8[np.ndarray, "b T H W 3"]
Features = Float[np.ndarray, "b f"]


def thumbnails(clips: Clips) -> Features:
    """Thumbnails of clips: five frames of 8 x 8 cells.

    Their mean color is taken out, and their contrast is made the same, so that a change
    of light changes little.
    """
    # Not the first and the last, which a clip played earlier or later doesn't have.
    ends = (1, clips.shape[1] - 2) if clips.shape[1] > 2 else (0, clips.shape[1] - 1)
    frames = np.linspace(*ends, _FRAMES).round().astype(int)
    rows = [np.array_split(np.arange(size), _CELLS) for size in clips.shape[2:4]]
    small = clips[:, frames].astype(np.float32) / 255
    for axis, cells in enumerate(rows, start=2):
        small = np.stack([small.take(c, axis).mean(axis) for c in cells], axis)
    small -= small.mean((1, 2, 3), keepdims=True)
    small = small.reshape(len(clips), -1)
    return small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)


def variants(clips: Clips) -> Float[np.ndarray, "b v f"]:
    """Thumbnails of clips, and of what one could change in them to hide a copy.

    They are mirrored, moved by up to a sixteenth of the short side, and played a frame
    earlier or later.
    """
    step = max(min(clips.shape[2:4]) // 32, 1)
    frames = np.arange(clips.shape[1])
    changed = []
    for side in (clips, clips[:, :, :, ::-1]):
        changed += [np.roll(side, n * step, 2) for n in (-2, -1, 0, 1, 2)]
        changed += [np.roll(side, n * step, 3) for n in (-2, -1, 1, 2)]
        changed += [side[:, np.clip(frames + n, 0, frames[-1])] for n in (-1, 1)]
    return np.stack([thumbnails(x) for x in changed], 1)


def memorisation(
    generated: Float[np.ndarray, "g v f"],
    train: Float[np.ndarray, "t f"],
    held_out: Float[np.ndarray, "h v f"],
) -> dict[str, float]:
    """Measures how many clips are copies of training clips.

    Args:
        generated: `variants` of the clips, of which the nearest to training counts.
        train: thumbnails of training clips.
        held_out: `variants` of real clips that were not trained on.

    Returns:
        "copies", the share of clips that are nearer to a training clip than 99 % of the
        held-out clips; and "authentic", the share of clips farther from their nearest
        training clip than that one is from its own nearest neighbour (Alaa et al.,
        arXiv:2102.08921, section 4). Real clips have about 0.01 and 0.9.
    """
    usual, _ = _nearest_variant(held_out, train)
    distance, nearest = _nearest_variant(generated, train)
    near, places = np.unique(nearest, return_inverse=True)
    own = _nearest(train[near], train, apart=near)[0]
    return {
        "copies": float((distance < np.quantile(usual, 0.01)).mean()),
        "authentic": float((distance >= own[places]).mean()),
    }


def _nearest_variant(clips: np.ndarray, train: np.ndarray):
    """Distance to, and index of, the nearest training clip of any variant."""
    distance, index = _nearest(clips.reshape(-1, clips.shape[-1]), train)
    distance, index = (x.reshape(clips.shape[:2]) for x in (distance, index))
    best = distance.argmin(1)
    row = np.arange(len(clips))
    return distance[row, best], index[row, best]


def _nearest(a: np.ndarray, b: np.ndarray, apart: np.ndarray | None = None):
    """Distance to, and index of, the nearest row of b for each row of a.

    `apart` is the index of the row of b that each row of a is, and isn't compared with.
    """
    distances, indices = [], []
    norms = np.square(b).sum(1)
    for start in range(0, len(a), 512):
        part = a[start : start + 512]
        squared = np.square(part).sum(1)[:, None] + norms - 2 * part @ b.T
        if apart is not None:
            squared[np.arange(len(part)), apart[start : start + 512]] = np.inf
        indices.append(squared.argmin(1))
        distances.append(np.sqrt(np.maximum(squared.min(1), 0)))
    return np.concatenate(distances), np.concatenate(indices)


def random_features(clips: Clips, seed: int = 3) -> Features:
    """Mean and standard deviation of the responses of 96 random 5 x 7 x 7 filters.

    The filters are drawn from a seeded generator and untrained, so that the distance
    needs no downloaded network and no learned preference enters it.

    Args:
        clips: RGB in [0, 255].
        seed: seed of the filters.
    """
    taps = int(np.prod(_KERNEL)) * 3
    rng = np.random.Generator(np.random.Philox(seed))
    filters = rng.standard_normal((taps, _FILTERS), np.float32)
    filters -= filters.mean(0)
    # Half of them see nothing but change, which is a small part of most clips.
    moving = filters.reshape(_KERNEL[0], -1, _FILTERS)[..., ::2]
    moving -= moving.mean(0)
    filters /= np.linalg.norm(filters, axis=0)
    filters[:, ::2] *= _CHANGE
    rows = []
    for clip in clips:
        pixels = clip.astype(np.float32) / 127.5 - 1
        windows = sliding_window_view(pixels, _KERNEL, axis=(0, 1, 2))
        windows = windows[:: _STRIDE[0], :: _STRIDE[1], :: _STRIDE[2]]
        windows = windows.transpose(0, 1, 2, 4, 5, 6, 3).reshape(-1, taps)
        response = np.maximum(windows @ filters, 0)
        rows.append(np.concatenate([response.mean(0), response.std(0)]))
    return np.stack(rows)


def frechet_distance(a: Float[np.ndarray, "n f"], b: Float[np.ndarray, "m f"]) -> float:
    """The squared Fréchet distance between normal distributions fitted to two sets.

    Eq. 6 of Heusel et al. (arXiv:1706.08500). Features may come from any network.

    Args:
        a: features of one set of clips.
        b: features of the other.
    """
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    # The square root's eigenvalues are the roots of these, which are real and >= 0.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())
