"""The report on a model of one's own clips: what can be measured outside the world.

Nobody knows there what a caption asks to see. So clips that are made for the captions
of held-out clips are shown beside those, and compared with them as a set; and the
autoencoder and the loss are measured on held-out clips.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.evaluation import oracle, own_sound, report
from jvdit.evaluation.autoencoder_report import enlarged
from jvdit.evaluation.distance import frechet_distance, random_features
from jvdit.evaluation.vae_report import MEANING, MEASURES
from jvdit.machine.files import write_atomically
from jvdit.machine.json_files import write_json

_SHOWN = 12  # clips
_HELD_OUT = "validation/"

Video = UInt8[np.ndarray, "T H W 3"]
Features = Callable[[Sequence[Video]], Float[np.ndarray, "n f"]]


class Compared(NamedTuple):
    """A held-out clip, and what was made of it.

    Attributes:
        real: its pixels.
        reconstructed: by the autoencoder.
        generated: for its caption.
        sounds: of both, and others; None: the clip or the model has none.
    """

    real: Video
    reconstructed: Video
    generated: Video
    caption: str
    fps: float
    sounds: own_sound.Sounds | None = None


def report_clips(
    out: pathlib.Path,
    model: str,
    data: str,
    clips: Sequence[Compared],
    bad: Sequence[Mapping[str, Any]],
    history: Mapping[str, Sequence[tuple[int, float]]],
    features: Features | None,
) -> list[pathlib.Path]:
    """Writes report.json and report.html, and returns their paths.

    Args:
        out: folder for the report.
        model: the model's folder, which the report names.
        data: name of the source of the held-out clips.
        clips: the clips; two at least.
        bad: clips that can't be read, with the reasons.
        history: scalars of the model's training, by name: (step, value) pairs.
        features: of a network of the user's own, for a Fréchet distance on them.
    """
    each = {
        name: np.array([float(f(x.reconstructed, x.real)) for x in clips])
        for name, f in MEASURES.items()
    }
    measures = oracle.summary(each)
    known = {"random filters": _random_features}
    known |= {"your features": features} if features else {}
    distances = {name: _distances(clips, f) for name, f in known.items()}
    heard = [x.sounds for x in clips if x.sounds is not None]
    agreed = {}
    if len(heard) > 1:
        distances["levels of the sound"] = own_sound.sound_distances(heard)
        agreed = own_sound.agreement(heard)
    losses = {
        name.removeprefix(_HELD_OUT): dict(
            zip(("step", "loss"), points[-1], strict=True)
        )
        for name, points in history.items()
        if name.startswith(_HELD_OUT) and points
    }
    found = {
        "reconstruction": measures,
        "frechet_distance": distances,
        "held_out_loss": losses,
        "sound": {"clips": len(heard), "agreement": agreed},
    }
    told = {"model": model, "data": data, "clips": len(clips), "bad": list(bad)}
    write_json(out / "report.json", told | found)
    title = f"{model}: {len(clips)} clips of {data}"
    parts = [
        report.section("Clips it makes for held-out captions", *_figures(clips)),
        *_tables(measures, distances, losses),
    ]
    if agreed:
        parts.insert(1, _sound_table(agreed, len(heard)))
    write_atomically(out / "report.html", report.page(title, parts).encode())
    return [out / "report.json", out / "report.html"]


def _tables(
    measures: Mapping[str, report.Interval],
    distances: Mapping[str, Mapping[str, float]],
    losses: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """The sections of the page that hold numbers."""
    sets = {"generated": "generated", "reconstructed": "reconstructed"}
    sets["real"] = "half of the real to half"
    apart = [
        [name, *(f"{x[k]:.4g}" if k in x else "–" for k in sets)]
        for name, x in distances.items()
    ]
    quality = [
        [f"{k} <small>{MEANING[k]}</small>", report.number(v)]
        for k, v in measures.items()
    ]
    lost = [[k, f"{x['loss']:.4g}", f"{x['step']}"] for k, x in losses.items()]
    return [
        report.section(
            "Fréchet distance to the held-out clips, lower is better",
            report.table(["features", *sets.values()], apart),
        ),
        report.section("Its autoencoder on them", report.table(["", ""], quality)),
        report.section(
            "Loss on the held-out clips of its training, by noise level",
            report.table(["", "loss", "after steps"], lost)
            if lost
            else "<p>its folder has no history of a training</p>",
        ),
    ]


def _sound_table(
    agreed: Mapping[str, Mapping[str, report.Interval]], count: int
) -> str:
    """The section on how sounds agree with those of the clips."""
    head = ["", *(f"{name}: {what}" for name, what in own_sound.MEANING.items())]
    none = (math.nan,) * 3
    rows = [
        [heard, *(report.number(scores.get(name, none)) for name in own_sound.MEANING)]
        for heard, scores in agreed.items()
    ]
    title = f"What is heard in the place of a clip's own sound, {count} clips"
    return report.section(title, report.table(head, rows))


def _random_features(clips: Sequence[Video]) -> Float[np.ndarray, "n f"]:
    """`random_features` of clips of any sizes."""
    return np.concatenate([random_features(clip[None]) for clip in clips])


def _distances(clips: Sequence[Compared], features: Features) -> dict[str, float]:
    """Distances from the real clips, and of one half of those from the other."""
    sets = zip(*(x[:3] for x in clips), strict=True)
    real, reconstructed, generated = map(features, sets)
    found = {
        "generated": frechet_distance(generated, real),
        "reconstructed": frechet_distance(reconstructed, real),
    }
    if len(real) > 3:  # a half needs two clips
        found["real"] = frechet_distance(real[::2], real[1::2])
    return found


def _figures(clips: Sequence[Compared]) -> list[str]:
    """Real and generated clips, side by side; with sound, each by itself."""
    return [report.films("", [_figure(x) for x in clips[:_SHOWN]])]


def _figure(clip: Compared) -> str:
    if clip.sounds is None:
        video = enlarged(np.concatenate([clip.real, clip.generated], axis=2))
        told = "left: the held-out clip; right: generated for its caption"
        return report.film(video, clip.fps, clip.caption, [told])
    sounds = clip.sounds
    shown = [(clip.real, sounds.real), (clip.generated, sounds.generated)]
    told = "the held-out clip; generated for its caption"
    if sounds.followed is not None:
        shown.append((clip.real, sounds.followed))
        told += "; the held-out clip with a sound made for it"
    players = [
        report.player(enlarged(video), clip.fps, sound, sounds.rate)
        for video, sound in shown
    ]
    return report.figure(players, clip.caption, [told])
