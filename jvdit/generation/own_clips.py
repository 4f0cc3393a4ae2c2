"""What a model of one's own clips makes for held-out ones, to be compared with them."""

import dataclasses
from typing import Any

import numpy as np

from jvdit.data.clips import BadClip, Clip
from jvdit.data.sounds import sound_of
from jvdit.data.sources import open_source
from jvdit.evaluation.autoencoder_report import source_clips
from jvdit.evaluation.clips_report import Compared
from jvdit.evaluation.own_sound import Sounds
from jvdit.generation.generator import Generator
from jvdit.generation.reconstructor import Reconstructor
from jvdit.generation.request import Request
from jvdit.generation.world_clips import Setting
from jvdit.models.audio_vae import AudioVAE


def counterparts(
    generator: Generator, name: str, count: int, setting: Setting, rows: int
) -> tuple[list[Compared], list[dict[str, Any]]]:
    """Makes a clip for the caption of each of a source's first clips.

    A model of sound also makes a sound for the picture of each clip that has one, if it
    takes pictures (`picture_to_sound`).

    Args:
        generator: of the model.
        name: name of the source, for `open_source`.
        count: most clips to use.
        setting: of generation.
        rows: rows that are solved at once.

    Returns:
        The clips; those that can't be read as JSON values, each with the reason.

    Raises:
        ValueError: fewer than two clips can be read, or the model doesn't make clips of
            their size.
    """
    model = generator.model
    rate = model.audio_vae.sample_rate if model.has_sound else 0
    read, bad = source_clips(open_source(name, audio_rate=rate), name, count)
    whole = Reconstructor(model.networks["vae"])
    real = [whole.fit(clip["video"], generator.unit) for clip in read]
    requests = [
        Request(clip["caption"], "", *x.shape[:3], fps=clip["fps"], seed=i)
        for i, (clip, x) in enumerate(zip(read, real, strict=True))
    ]
    for request in requests:
        generator.check(request)
    solving = setting.solving | {"rows": rows}
    made = generator(requests, **solving)
    own = [
        None if x.audio is None else _own_sound(clip, request, model.audio_vae)
        for clip, request, x in zip(read, requests, made, strict=True)
    ]
    heard = [i for i, sound in enumerate(own) if sound is not None]
    followed: dict[int, np.ndarray] = {}
    if heard and "picture_to_sound" in model.conditions:
        given = [dataclasses.replace(requests[i], from_video=real[i]) for i in heard]
        sounds = generator(given, **solving | {"draft": False, "sound_after": False})
        followed = {i: x.audio for i, x in zip(heard, sounds, strict=True)}
    coded = generator.codec
    sounds = {
        i: Sounds(
            own[i],
            coded.decode_sound(coded.encode_sound(own[i]), len(own[i])),
            made[i].audio,
            followed.get(i),
            made[i].audio_rate,
        )
        for i in heard
    }
    return [
        Compared(
            x,
            whole(x)[1],
            made[i].video,
            requests[i].prompt,
            made[i].fps,
            sounds.get(i),
        )
        for i, x in enumerate(real)
    ], bad


def _own_sound(clip: Clip, request: Request, vae: AudioVAE) -> np.ndarray | None:
    """The sound of a held-out clip as long as its pictures are; None: it has none."""
    sound = sound_of(clip, vae.channels)
    if isinstance(sound, BadClip):
        return None
    samples = request.samples(vae.sample_rate)
    return np.pad(sound[:samples], ((0, max(samples - len(sound), 0)), (0, 0)))
