"""Sound of the procedural world: what is heard when objects hit something.

It is a quiet noise floor with a decaying tone at every bounce, whose pitch tells
material and size. Units are those of `jvdit.data.world.scene`; dimension name: a audio
samples.
"""

import functools

import numpy as np
from jaxtyping import Float

from jvdit.data.world.mechanics import Motion
from jvdit.data.world.scene import SIZES, Scenes, uniform

FREQUENCIES = (180.0, 500.0, 900.0, 1700.0)  # Hz, of a large object of each material
SMALL_PITCH = 1.5  # factor on the frequency of a small object
_DECAYS = (0.040, 0.025, 0.110, 0.070)  # seconds
_PARTIALS = (  # (ratio to the frequency, amplitude)
    ((1.0, 1.0),),
    ((1.0, 1.0), (2.57, 0.4)),
    ((1.0, 1.0), (2.76, 0.6), (5.40, 0.25)),
    ((1.0, 1.0), (2.32, 0.5), (4.25, 0.25)),
)
_ATTACK = 0.001  # seconds
_NOISE_AMPLITUDE = 1e-3  # of a uniform distribution: about -65 dB
_NOISE_LENGTH = 1 << 16
_LOUDEST, _SOFTEST = 0.34, 0.12  # peak of a single bounce, but for glancing touches
_LOUD_IMPACT, _GLANCING_IMPACT = 2.0, 0.1  # short sides per second


@functools.cache
def bounce_tone(
    material: int, size: int, audio_rate: int
) -> Float[np.ndarray, " samples"]:
    """Sound of a bounce of an object, with peak 1, from the contact on.

    The object is of `MATERIALS[material]` and `SIZES[size]`. Partials that `audio_rate`
    (samples per second) cannot hold are left out.
    """
    decay = _DECAYS[material]
    time = np.arange(int(7 * decay * audio_rate)) / audio_rate  # down to -61 dB
    pitch = FREQUENCIES[material] * (SMALL_PITCH if SIZES[size] == "small" else 1)
    tone = np.zeros_like(time)
    for order, (ratio, amplitude) in enumerate(_PARTIALS[material]):
        if ratio * pitch < 0.48 * audio_rate:
            fading = np.exp(-time / decay * (1 + 0.5 * order))
            tone += amplitude * fading * np.sin(2 * np.pi * ratio * pitch * time)
    tone *= np.minimum(time / _ATTACK, 1)
    tone = (tone / np.abs(tone).max()).astype(np.float32)
    tone.setflags(write=False)  # the cache hands the same array to everyone
    return tone


@functools.cache
def _noise() -> np.ndarray:
    """The noise floor, from which every clip takes a stretch."""
    numbers = uniform(np.array(7, np.uint64), _NOISE_LENGTH)
    return (_NOISE_AMPLITUDE * (2 * numbers - 1)).astype(np.float32)


def loudness(impact: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Peak amplitude of the tone of a bounce; touches that one cannot see are faint."""
    strength = np.minimum(impact / _LOUD_IMPACT, 1)
    peak = _SOFTEST + (_LOUDEST - _SOFTEST) * strength
    return peak * np.minimum(impact / _GLANCING_IMPACT, 1)


def synthesize(
    scenes: Scenes, motion: Motion, samples: int, audio_rate: int
) -> Float[np.ndarray, "b a 1"]:
    """Sounds of the scenes from time 0 on, mono in [-1, 1], at `audio_rate` Hz."""
    noise = _noise()
    floor = np.tile(noise, 1 + -(-samples // len(noise)))
    audio = np.empty((len(scenes.ids), samples), np.float32)
    for row, start in enumerate((scenes.noise * len(noise)).astype(int)):
        audio[row] = floor[start : start + samples]
    contact = np.rint(np.minimum(motion.time * audio_rate, samples)).astype(int)
    peak = loudness(motion.impact).astype(np.float32)
    slots = np.stack([motion.first, motion.second], -1)
    peak = np.where(motion.second < 0, peak, np.float32(0.7) * peak)
    heard = (contact < samples)[..., None] & (slots >= 0)
    row, bounce, _ = np.nonzero(heard)
    kind = scenes.material[row, slots[heard]], scenes.size[row, slots[heard]]
    columns = row, contact[row, bounce], peak[row, bounce], *kind
    for row, start, volume, *kind in zip(*(x.tolist() for x in columns), strict=True):
        tone = bounce_tone(*kind, audio_rate)[: samples - start]
        part = audio[row, start : start + len(tone)]
        part += volume * tone
    np.clip(audio, -1, 1, out=audio)
    return audio[..., None]
