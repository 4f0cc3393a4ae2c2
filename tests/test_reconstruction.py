"""PSNR and SSIM are those of the books."""

import numpy as np
import pytest

from jvdit.evaluation.reconstruction import psnr, ssim

RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 246, (2, 3, 16, 20, 3), dtype=np.uint8)


def test_psnr_of_a_known_error():
    np.testing.assert_allclose(psnr(VIDEO + np.uint8(5), VIDEO), 34.1514, rtol=1e-5)
    np.testing.assert_allclose(psnr(VIDEO, VIDEO), 100.0)
    # Each video by itself.
    other = VIDEO.copy()
    other[1] += 9
    assert psnr(other, VIDEO)[0] == 100 > psnr(other, VIDEO)[1]


def test_ssim_follows_its_definition():
    """Against the sums over every window, written out."""
    a = RNG.integers(0, 256, (1, 13, 12, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + RNG.integers(-60, 60, a.shape), 0, 255).astype(np.uint8)
    line = np.exp(-(np.arange(-5, 6.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for y, x, c in np.ndindex(3, 2, 3):
        p, q = (v[0, y : y + 11, x : x + 11, c].astype(float) for v in (a, b))
        mean_p, mean_q = (window * p).sum(), (window * q).sum()
        var_p = (window * (p - mean_p) ** 2).sum()
        var_q = (window * (q - mean_q) ** 2).sum()
        both = (window * (p - mean_p) * (q - mean_q)).sum()
        found.append(
            (2 * mean_p * mean_q + 2.55**2)
            * (2 * both + 7.65**2)
            / ((mean_p**2 + mean_q**2 + 2.55**2) * (var_p + var_q + 7.65**2))
        )
    np.testing.assert_allclose(ssim(b, a), np.mean(found), rtol=1e-9)
    assert ssim(a, a) == 1


def test_frames_smaller_than_the_window_are_named():
    with pytest.raises(ValueError, match="10 x 20.*11 x 11"):
        ssim(VIDEO[..., :10, :, :], VIDEO[..., :10, :, :])
