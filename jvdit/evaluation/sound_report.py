"""The report on an audio autoencoder: the quality of its reconstructions.

On clips of the procedural world the oracle also hears the reconstructions while it sees
the real pictures: a model that generates latents of this autoencoder can't be expected
to score higher. Sounds that are wrong in a known way show what the scores are worth.
"""

import functools
import pathlib
from collections.abc import Callable

import numpy as np

from jvdit.data.clips import BadClip, Clip
from jvdit.data.sounds import sound_of
from jvdit.data.sources import WorldSource, open_source
from jvdit.data.spectrum import spectrogram
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
from jvdit.evaluation.hearing import Sound, log_mel_distance, si_sdr
from jvdit.evaluation.measuring import CHUNK, controls


def report_audio_vae(
    folder: str,
    reconstruct: Callable[[Sound], Sound],
    sound: tuple[int, int],
    name: str,
    count: int,
    out: pathlib.Path,
) -> list[pathlib.Path]:
    """Reconstructs the sound of clips, scores it, and writes a report.

    Args:
        folder: the autoencoder's folder, which the report names.
        reconstruct: returns the reconstruction of a sound, in its length; such as a
            `SoundReconstructor`.
        sound: samples per second and channels that it takes.
        name: name of the source of clips, for `open_source`.
        count: most clips to use.
        out: folder for the report.

    Returns:
        The paths of report.json and report.html.

    Raises:
        ValueError: none of the clips can be read, or none has sound.
    """
    rate, channels = sound

    def run(clip: Clip) -> tuple[np.ndarray, np.ndarray] | BadClip:
        audio = sound_of(clip, channels)
        return audio if isinstance(audio, BadClip) else (audio, reconstruct(audio))

    source = open_source(name, audio_rate=rate)
    pairs = reconstructions(source, name, count, run)
    distance = functools.partial(log_mel_distance, rate=rate)
    measures = {
        "si_sdr": Measure(si_sdr, "signal over distortion, of any loudness, dB"),
        "log_mel": Measure(distance, "difference of the levels by time and band, dB"),
    }
    scores = None
    if isinstance(source, WorldSource):
        scores = _oracle(source.world, pairs, rate)
    figure = functools.partial(_figure, rate=rate)
    return write_report(out, folder, name, pairs, measures, scores, figure)


def _oracle(world: World, pairs: Pairs, rate: int) -> Scores:
    """The oracle's scores of real pictures with their sound, and with others."""
    oracle.check_frames(world.frames)
    real = np.stack([x.original.mean(1) for x in pairs.good])
    decoded = np.stack([x.decoded.mean(1) for x in pairs.good])
    parts: dict[str, list[oracle.Scores]] = {}
    for start in range(0, len(real), CHUNK):
        some = slice(start, start + CHUNK)
        scenes = world.scenes(np.array([x.index for x in pairs.good[some]]))
        videos = np.stack([x.clip["video"] for x in pairs.good[some]])
        seen = oracle.observe(videos, scenes, world.fps)
        sounds = {
            "real": (scenes, real[some]),
            "reconstructed": (scenes, decoded[some]),
            **controls(scenes, real[some], rate),
        }
        for who, (told, audio) in sounds.items():
            heard = oracle.listen(seen, told, world.fps, audio, rate)
            parts.setdefault(who, []).append(heard)
    return {who: oracle.summary(oracle.joined(found)) for who, found in parts.items()}


def _figure(pair: Pair, told: str, rate: int) -> str:
    """Spectrograms of both sounds, and the clip with each of them."""
    video, fps = enlarged(pair.clip["video"]), pair.clip["fps"]
    drawn = [spectrogram(x, rate) for x in (pair.original, pair.decoded)]
    gap = np.full((2, *drawn[0].shape[1:]), 255, np.uint8)
    parts = [report.picture(np.concatenate([drawn[0], gap, drawn[1]]))]
    for sound in (pair.original, pair.decoded):
        parts.append(report.player(video, fps, sound, rate))
    lines = [told, "above and left: the original; below and right: reconstructed"]
    return report.figure(parts, pair.clip["caption"], lines)
