"""Reconstruction quality of a video: PSNR, SSIM, sharpness and temporal error."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter

Frames = UInt8[np.ndarray, "*b T H W 3"]


def psnr(video: Frames, wanted: Frames) -> Float[np.ndarray, "*b"]:
    """Peak signal-to-noise ratio of each video in dB; at most 100."""
    error = np.square(video.astype(np.float64) - wanted).mean((-4, -3, -2, -1))
    return np.asarray(10 * np.log10(255**2 / np.maximum(error, 255**2 * 1e-10)))


def ssim(video: Frames, wanted: Frames) -> Float[np.ndarray, "*b"]:
    """Structural similarity (SSIM) of each video; at most 1.

    Wang et al., "Image quality assessment: from error visibility to structural
    similarity" (2004), Eq. 13, with its Gaussian window of 11 x 11 pixels and standard
    deviation 1.5, averaged over frames, colours, and places where the window fits.

    Raises:
        ValueError: frames are smaller than the window.
    """
    if min(video.shape[-3:-1]) < 11:
        raise ValueError(
            f"frames of {video.shape[-3]} x {video.shape[-2]} pixels are smaller than "
            "the window of SSIM, 11 x 11 pixels."
        )
    x, y = video.astype(np.float64), wanted.astype(np.float64)

    def blurred(values):
        sigma = [0.0] * values.ndim
        sigma[-3] = sigma[-2] = 1.5
        return gaussian_filter(values, sigma, truncate=3.5)[..., 5:-5, 5:-5, :]

    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x**2
    variance_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return np.asarray(likeness.mean((-4, -3, -2, -1)))


def sharpness(video: Frames, wanted: Frames) -> Float[np.ndarray, "*b"]:
    """Energy of the gradients in space, relative to that of the wanted video.

    1 is as sharp; less is blurred, and more has edges or noise that aren't there. Of a
    wanted video without any gradients it is NaN.
    """

    def energy(values: Frames) -> np.ndarray:
        x = values.astype(np.float64)
        down, right = (np.square(np.diff(x, axis=axis)) for axis in (-3, -2))
        every = (-4, -3, -2, -1)
        return np.asarray(down.mean(every) + right.mean(every))

    whole = energy(wanted)
    return np.asarray(energy(video) / np.where(whole > 0, whole, np.nan))


def temporal_error(video: Frames, wanted: Frames) -> Float[np.ndarray, "*b"]:
    """Mean absolute error of the differences between frames; 1 is full brightness.

    It measures flicker that isn't in the wanted video, and motion that is missing. An
    image has 0.
    """
    change = np.diff(video.astype(np.float32), axis=-4)
    error = np.abs(change - np.diff(wanted.astype(np.float32), axis=-4))
    if error.shape[-4] == 0:
        return np.zeros(video.shape[:-4])
    return np.asarray(error.mean((-4, -3, -2, -1)) / 255)
