"""How far a set of clips is from another: copies, and a distance of distributions."""

import numpy as np
from jaxtyping import Float, UInt8
from numpy.lib.stride_tricks import sliding_window_view

_FRAMES, _CELLS = 5, 8  # of a thumbnail
_KERNEL, _STRIDE, _FILTERS = (5, 7, 7), (2, 4, 4), 96

Clips = UInt8[np.ndarray, "b T H W 3"]
Features = Float[np.ndarray, "b f"]


def thumbnails(clips: Clips) -> Features:
    """Five frames of 8 x 8 cells each, without the clip's mean color."""
    frames = np.linspace(0, clips.shape[1] - 1, _FRAMES).round().astype(int)
    rows = [np.array_split(np.arange(size), _CELLS) for size in clips.shape[2:4]]
    small = clips[:, frames].astype(np.float32) / 255
    for axis, cells in enumerate(rows, start=2):
        small = np.stack([small.take(c, axis).mean(axis) for c in cells], axis)
    return (small - small.mean((1, 2, 3), keepdims=True)).reshape(len(clips), -1)


def memorisation(
    generated: Float[np.ndarray, "g f"],
    train: Float[np.ndarray, "t f"],
    held_out: Float[np.ndarray, "h f"],
) -> dict[str, float]:
    """Whether clips are copies of training clips, by their `thumbnails`.

    Returns:
        "copies": share of the clips nearer to a training clip than all but 1 % of the
        held-out clips are. "authentic": share of the clips that are farther from the
        nearest training clip than that one is from its own neighbour (Alaa et al.,
        arXiv:2102.08921, section 4); of real clips about 0.9.
    """
    usual = _nearest(held_out, train)[0]
    distance, nearest = _nearest(generated, train)
    own = _nearest(train, train, apart=True)[0]
    return {
        "copies": float((distance < np.quantile(usual, 0.01)).mean()),
        "authentic": float((distance >= own[nearest]).mean()),
    }


def _nearest(a: np.ndarray, b: np.ndarray, apart: bool = False):
    """Distance to, and index of, the nearest row of b for each row of a."""
    distances, indices = [], []
    norms = np.square(b).sum(1)
    for start in range(0, len(a), 512):
        part = a[start : start + 512]
        squared = np.square(part).sum(1)[:, None] + norms - 2 * part @ b.T
        if apart:
            np.fill_diagonal(squared[:, start:], np.inf)
        indices.append(squared.argmin(1))
        distances.append(np.sqrt(np.maximum(squared.min(1), 0)))
    return np.concatenate(distances), np.concatenate(indices)


def random_features(clips: Clips, seed: int = 3) -> Features:
    """Mean and spread of the responses of 96 random filters of 5 x 7 x 7 pixels.

    The filters come from a seeded generator and were never trained, so that the
    distance needs no downloaded network and has no taste.
    """
    taps = int(np.prod(_KERNEL)) * 3
    filters = np.random.Generator(np.random.Philox(seed)).standard_normal(
        (taps, _FILTERS), np.float32
    )
    filters -= filters.mean(0)
    filters /= np.linalg.norm(filters, axis=0)
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
    """Squared Fréchet distance of normal distributions fitted to two sets of features.

    Eq. 6 of Heusel et al. (arXiv:1706.08500). Features may come from any network.
    """
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    # The eigenvalues of the product are those of its root, squared: real, not < 0.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0))
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())
