"""PSNR and SSIM are those of the books."""

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from jvdit.evaluation.reconstruction import psnr, sharpness, ssim

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


def test_sharpness_falls_with_blur_and_rises_with_noise():
    rng = np.random.default_rng(0)
    wanted = rng.integers(64, 192, (2, 3, 16, 16, 3), np.uint8)
    blurred = uniform_filter(wanted.astype(float), (0, 0, 3, 3, 0)).astype(np.uint8)
    noisy = wanted + rng.integers(-40, 40, wanted.shape, np.int64).astype(np.uint8)
    np.testing.assert_array_equal(sharpness(wanted, wanted), 1)
    assert (sharpness(blurred, wanted) < 0.3).all()
    assert (sharpness(noisy, wanted) > 1.1).all()
    # Of half the contrast there is a quarter of the energy.
    faint = (wanted // 2 * 2).astype(np.uint8)
    np.testing.assert_allclose(sharpness(faint // 2, faint), 0.25)
    assert np.isnan(sharpness(wanted, np.full_like(wanted, 7))).all()
