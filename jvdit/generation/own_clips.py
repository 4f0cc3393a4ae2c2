"""What a model of one's own clips makes for held-out ones, to be compared with them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jvdit.data.clips import BadClip, Clip
from jvdit.data.sounds import sound_of
from jvdit.data.sources import open_source
from jvdit.evaluation.autoencoder_report import Pairs, reconstructions
from jvdit.evaluation.own_sound import Sounds
from jvdit.generation.generator import Generator
from jvdit.generation.reconstructor import Reconstructor
from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip
from jvdit.generation.world_clips import Setting
from jvdit.models.audio_vae import AudioVAE

Video = UInt8[np.ndarray, "T H W 3"]


def counterparts(
    generator: Generator, name: str, count: int, setting: Setting, rows: int
) -> tuple[Pairs, list[Video], list[Sounds | None]]:
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
        The held-out clips and their reconstructions; what is made for the caption of
        each; and the sounds of both, None where either has none.

    Raises:
        ValueError: fewer than two clips can be read, or the model doesn't make clips of
            their size.
    """
    model, requests = generator.model, []
    whole = Reconstructor(model.networks["vae"])

    def run(clip: Clip) -> tuple[Video, Video]:
        real = whole.fit(clip["video"], generator.unit)
        how = {"fps": clip["fps"], "seed": len(requests)}
        requests.append(Request(clip["caption"], "", *real.shape[:3], **how))
        generator.check(requests[-1])
        return whole(real)

    rate = model.audio_vae.sample_rate if model.has_sound else 0
    source = open_source(name, audio_rate=rate)
    pairs = reconstructions(source, name, count, run, least=2)
    solving = setting.solving | {"rows": rows}
    made = generator(requests, **solving)
    sounds: list[Sounds | None] = [None] * len(made)
    if rate:
        sounds = _sounds(generator, pairs, requests, made, solving)
    return pairs, [clip.video for clip in made], sounds


def _sounds(
    generator: Generator,
    pairs: Pairs,
    requests: Sequence[Request],
    made: Sequence[GeneratedClip],
    solving: Mapping[str, Any],
) -> list[Sounds | None]:
    """The sounds of held-out clips and of what was made for them."""
    codec, vae = generator.codec, generator.model.audio_vae
    own = [
        None if clip.audio is None else _own_sound(pair.clip, request, vae)
        for pair, request, clip in zip(pairs.good, requests, made, strict=True)
    ]
    heard = [i for i, sound in enumerate(own) if sound is not None]
    followed: dict[int, np.ndarray] = {}
    if "picture_to_sound" in generator.model.conditions:
        seen = {i: {"from_video": pairs.good[i].original} for i in heard}
        given = [dataclasses.replace(requests[i], **seen[i]) for i in heard]
        heed = generator(given, **{**solving, "draft": False, "sound_after": False})
        followed = {i: clip.audio for i, clip in zip(heard, heed, strict=True)}
    return [
        None
        if sound is None
        else Sounds(
            sound,
            codec.decode_sound(codec.encode_sound(sound), len(sound)),
            made[i].audio,
            followed.get(i),
            vae.sample_rate,
        )
        for i, sound in enumerate(own)
    ]


def _own_sound(clip: Clip, request: Request, vae: AudioVAE) -> np.ndarray | None:
    """The sound of a held-out clip as long as its pictures are; None: it has none."""
    sound = sound_of(clip, vae.channels)
    if isinstance(sound, BadClip):
        return None
    samples = request.samples(vae.sample_rate)
    return np.pad(sound[:samples], ((0, max(samples - len(sound), 0)), (0, 0)))
