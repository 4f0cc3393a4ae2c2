"""The report on a video autoencoder: the quality of its reconstructions.

On clips of the procedural world the oracle also scores the reconstructions: a model
that generates latents of this autoencoder can't be expected to score higher.
"""

import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import Progress

from jvdit.data.clips import BadClip
from jvdit.data.sources import WorldSource, open_source
from jvdit.evaluation import oracle, report
from jvdit.evaluation.reconstruction import psnr, ssim, temporal_error
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import write_json

MEASURES = {"psnr": psnr, "ssim": ssim, "temporal_error": temporal_error}
_MEANING = {
    "psnr": "dB",
    "ssim": "structural similarity",
    "temporal_error": "change from frame to frame, error of",
}
_LEAST_HEIGHT = 96  # pixels; smaller clips are enlarged
_CHUNK = 8  # clips that are read together

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
    count = min(count, len(source))
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("reconstructing", total=count)
        pairs, bad = [], []
        for start in range(0, count, _CHUNK):
            ids = range(start, min(start + _CHUNK, count))
            for i, clip in zip(ids, source.read(ids), strict=True):
                if isinstance(clip, BadClip):
                    bad.append({"clip": i, "reason": clip.reason})
                    continue
                pairs.append((*reconstruct(clip["video"]), clip))
            progress.advance(task, len(ids))
    if not pairs:
        raise ValueError(f"none of the {count} clips of {name} can be read: {bad[:1]}.")
    measured = {
        label: np.array([float(measure(b, a)) for a, b, _ in pairs])
        for label, measure in MEASURES.items()
    }
    found = oracle.summary(measured)
    results = {"vae": folder, "data": name, "clips": len(pairs), "bad": bad}
    results |= {"measures": found}
    rows = [
        [f"{k} <small>{_MEANING[k]}</small>", report.number(v)]
        for k, v in found.items()
    ]
    parts = [report.section(name, report.table(["", folder], rows))]
    whole = pairs[0][0].shape == pairs[0][2]["video"].shape
    if isinstance(source, WorldSource) and whole:  # cropped clips show another scene
        scores = _oracle(source, pairs)
        results |= {"oracle": scores}
        parts.append(
            report.section(
                "What the oracle sees",
                report.score_table(scores["real"], {"reconstructed": scores["vae"]}),
            )
        )
    parts.append(report.section("Clips", *_examples(pairs, measured)))
    write_json(out / "report.json", results)
    title = f"{len(pairs)} clips through {folder}"
    write_atomically(out / "report.html", report.page(title, parts).encode())
    return [out / "report.json", out / "report.html"]


def _oracle(source: WorldSource, pairs) -> dict[str, dict[str, tuple]]:
    """The oracle's scores of the originals ("real") and the reconstructions ("vae")."""
    world, scenes = source.world, source.world.scenes(np.arange(len(pairs)))
    found = {}
    for i, who in enumerate(("real", "vae")):
        videos = np.stack([pair[i] for pair in pairs])
        found[who] = oracle.summary(oracle.score(videos, scenes, world.fps))
    return found


def _examples(pairs, measured) -> list[str]:
    """The best, median and worst clips: original, reconstruction and difference."""
    parts = []
    for title, ids in report.examples(measured["psnr"]).items():
        figures = []
        for i in ids:
            original, decoded, clip = pairs[i]
            error = decoded.astype(np.int16) - original
            # Grey: no difference; four times its size, so that it can be seen.
            error = np.clip(4 * error + 128, 0, 255).astype(np.uint8)
            film = np.concatenate([original, decoded, error], axis=2)
            factor = max(1, -(-_LEAST_HEIGHT // film.shape[1]))
            film = film.repeat(factor, 1).repeat(factor, 2)
            told = ", ".join(f"{k} {v[i]:.3g}" for k, v in measured.items())
            figures.append(report.film(film, clip["fps"], clip["caption"], [told]))
        parts.append(report.films(title, figures))
    return parts
