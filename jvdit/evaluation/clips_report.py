"""The report on a model of one's own clips: what can be measured outside the world.

Nobody knows there what a caption asks to see. So clips that are made for the captions
of held-out clips are shown beside those, and compared with them as a set; and the
autoencoder and the loss are measured on held-out clips.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jvdit.evaluation import oracle, own_sound, report
from jvdit.evaluation.autoencoder_report import (
    Pair,
    Pairs,
    enlarged,
    measured,
    measures_table,
)
from jvdit.evaluation.distance import frechet_distance, random_features
from jvdit.evaluation.vae_report import MEASURES

_SHOWN = 12  # clips
_HELD_OUT = "validation/"

Video = UInt8[np.ndarray, "T H W 3"]
Features = Callable[[Sequence[Video]], Float[np.ndarray, "n f"]]


def report_clips(
    out: pathlib.Path,
    model: str,
    data: str,
    pairs: Pairs,
    generated: Sequence[Video],
    sounds: Sequence[own_sound.Sounds | None],
    history: Mapping[str, Sequence[tuple[int, float]]],
    features: Features | None,
) -> list[pathlib.Path]:
    """Writes report.json and report.html, and returns their paths.

    Args:
        out: folder for the report.
        model: the model's folder, which the report names.
        data: name of the source of the held-out clips.
        pairs: those clips, two at least, and their reconstructions.
        generated: for the caption of each.
        sounds: of each and of what was made for it; None: it has none.
        history: scalars of the model's training, by name: (step, value) pairs.
        features: of a network of the user's own, for a Fréchet distance on them.
    """
    clips, count = pairs.good, len(pairs.good)
    measures = oracle.summary(measured(pairs, MEASURES))
    known = {"random filters": _random_features}
    known |= {"your features": features} if features else {}
    sets = [x.original for x in clips], [x.decoded for x in clips], generated
    distances = {name: _distances(*map(f, sets)) for name, f in known.items()}
    heard = [x for x in sounds if x is not None]
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
    told = {
        "model": model,
        "data": data,
        "clips": count,
        "bad": pairs.bad,
        "reconstruction": measures,
        "frechet_distance": distances,
        "held_out_loss": losses,
        "sound": {"clips": len(heard), "agreement": agreed},
    }
    shown = zip(clips[:_SHOWN], generated, sounds, strict=False)
    films = report.films("", [_figure(*each) for each in shown])
    parts = [
        report.section("Clips it makes for held-out captions", films),
        *([_sound_table(agreed, len(heard))] if agreed else []),
        *_tables(measures, distances, losses),
    ]
    return report.write(out, told, f"{model}: {count} clips of {data}", parts)


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
    lost = [[k, f"{x['loss']:.4g}", f"{x['step']}"] for k, x in losses.items()]
    return [
        report.section(
            "Fréchet distance to the held-out clips, lower is better",
            report.table(["features", *sets.values()], apart),
        ),
        report.section(
            "Its autoencoder on them", measures_table("", measures, MEASURES)
        ),
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


def _figure(pair: Pair, generated: Video, sounds: own_sound.Sounds | None) -> str:
    """A real and a generated clip side by side; with sound, each by itself."""
    fps, caption = pair.clip["fps"], pair.clip["caption"]
    if sounds is None:
        video = enlarged(np.concatenate([pair.original, generated], axis=2))
        told = "left: the held-out clip; right: generated for its caption"
        return report.film(video, fps, caption, [told])
    shown = [(pair.original, sounds.real), (generated, sounds.generated)]
    told = "the held-out clip; generated for its caption"
    if sounds.followed is not None:
        shown.append((pair.original, sounds.followed))
        told += "; the held-out clip with a sound made for it"
    players = [
        report.player(enlarged(video), fps, sound, sounds.rate)
        for video, sound in shown
    ]
    return report.figure(players, caption, [told])


def _random_features(clips: Sequence[Video]) -> Float[np.ndarray, "n f"]:
    """`random_features` of clips of any sizes."""
    return np.concatenate([random_features(clip[None]) for clip in clips])


def _distances(
    real: np.ndarray, reconstructed: np.ndarray, generated: np.ndarray
) -> dict[str, float]:
    """Distances from the features of real clips, and of half of those to the others."""
    found = {
        "generated": frechet_distance(generated, real),
        "reconstructed": frechet_distance(reconstructed, real),
    }
    if len(real) > 3:  # a half needs two clips
        found["real"] = frechet_distance(real[::2], real[1::2])
    return found
