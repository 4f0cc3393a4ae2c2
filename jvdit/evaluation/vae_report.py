"""The report on a video autoencoder: the quality of its reconstructions.

On clips of the procedural world the oracle also scores the reconstructions: a model
that generates latents of this autoencoder can't be expected to score higher.
"""

import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from jvdit.data.sources import WorldSource, open_source
from jvdit.data.world import World
from jvdit.evaluation import oracle, report
from jvdit.evaluation.autoencoder_report import (
    Measure,
    Pair,
    Pairs,
    Scores,
    enlarged,
    reconstructions,
    write_report,
)
from jvdit.evaluation.reconstruction import psnr, sharpness, ssim, temporal_error

MEASURES = {
    "psnr": Measure(psnr, "dB"),
    "ssim": Measure(ssim, "structural similarity"),
    "sharpness": Measure(sharpness, "energy of edges over the original's"),
    "temporal_error": Measure(temporal_error, "change from frame to frame, error of"),
}

Video = UInt8[np.ndarray, "T H W 3"]


def report_vae(
    folder: str,
    reconstruct: Callable[[Video], tuple[np.ndarray, np.ndarray]],
    name: str,
    count: int,
    out: pathlib.Path,
) -> list[pathlib.Path]:
    """Reconstructs clips, scores the reconstructions, and writes a report.

    Args:
        folder: the autoencoder's folder, which the report names.
        reconstruct: returns a clip cropped to whole latents, and its reconstruction;
            such as a `Reconstructor`.
        name: name of the source of clips, for `open_source`.
        count: most clips to use.
        out: folder for the report.

    Returns:
        The paths of report.json and report.html.

    Raises:
        ValueError: none of the clips can be read.
    """
    source = open_source(name)
    pairs = reconstructions(source, name, count, lambda x: reconstruct(x["video"]))
    scores, first = None, pairs.good[0]
    whole = first.original.shape == first.clip["video"].shape
    if isinstance(source, WorldSource) and whole:  # cropped clips show another scene
        scores = _oracle(source.world, pairs)
    return write_report(out, folder, name, pairs, MEASURES, scores, _figure)


def _oracle(world: World, pairs: Pairs) -> Scores:
    """The oracle's scores of the originals and of the reconstructions."""
    scenes = world.scenes(np.array([x.index for x in pairs.good]))
    videos = {
        "real": np.stack([x.original for x in pairs.good]),
        "reconstructed": np.stack([x.decoded for x in pairs.good]),
    }
    return {
        who: oracle.summary(oracle.score(clips, scenes, world.fps))
        for who, clips in videos.items()
    }


def _figure(pair: Pair, told: str) -> str:
    """Original, reconstruction and difference, side by side."""
    error = pair.decoded.astype(np.int16) - pair.original
    # Grey: no difference; four times its size, so that it can be seen.
    error = np.clip(4 * error + 128, 0, 255).astype(np.uint8)
    film = enlarged(np.concatenate([pair.original, pair.decoded, error], axis=2))
    return report.film(film, pair.clip["fps"], pair.clip["caption"], [told])
