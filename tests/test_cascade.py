"""Clips made from clips: cascades, and footage made anew."""

import dataclasses

import numpy as np
import pytest

from jvdit.generation.cascade import STAGES, check_stage, next_request, refine
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.restyle import noised
from jvdit.generation.results import GeneratedClip
from jvdit.generation.settings import Settings

SETTINGS = Settings(steps=2, solver="euler", guidance_scale=1.0)
VIDEO = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def able(generator):
    conditions = "interpolate", "upscale"
    return Generator(dataclasses.replace(generator.model, conditions=conditions))


def test_stages_double_the_rate_and_the_size(able):
    """Of all that the first request gave nothing is given again; the sound stays."""
    audio = np.ones((9000, 1), np.float32)
    clip = GeneratedClip(VIDEO[:5], 8.0, audio, 8000)
    request = Request("x", seed=3, image=VIDEO[0], keyframes=((0.1, VIDEO[1]),))
    assert next_request("upscale", request, clip).given == ["upscale"]
    for stage in STAGES:
        check_stage(able, stage)
        request, clip = refine(able, stage, request, clip, SETTINGS)
    assert clip.video.shape == (9, 32, 32, 3) and clip.fps == 16.0
    assert clip.audio is audio and request.seed == 3
    assert request.size == (9, 32, 32)


def test_stages_that_cannot_be(able, generator):
    with pytest.raises(ValueError, match="'sharpen' must be one of: interpolate, up"):
        check_stage(able, "sharpen")
    with pytest.raises(ValueError, match="`upscale` was given, but this model takes"):
        check_stage(generator, "upscale")


def test_restyling_keeps_what_its_strength_leaves(generator):
    """Nothing of it at 1, where it is a clip from noise; more, the weaker it is."""
    request = generator.complete(Request("x", restyle=VIDEO))
    assert request.size == (9, 16, 16)
    codec = generator.codec
    latents = codec.encode(VIDEO.astype(np.float32) / 127.5 - 1)
    left = []
    for strength in (1.0, 0.5, 0.1):
        how = noised(generator.model, codec, [request], 10, strength)
        assert len(how["levels"]) == max(round(10 * strength), 1)
        left.append(np.corrcoef(how["noise"][0].ravel(), latents.ravel())[0, 1])
    assert abs(left[0]) < 0.2 and left[0] < left[1] < left[2] and left[2] > 0.9
    settings = dataclasses.replace(SETTINGS, steps=10)
    made = [
        dict(generator.clips([request], dataclasses.replace(settings, strength=s)))[0]
        for s in (0.1, 0.9)
    ]
    kept = codec.decode(latents[None])[0].astype(float)
    near, far = (np.abs(x.video - kept).mean() for x in made)
    assert near < far
    with pytest.raises(ValueError, match="to all requests of a call, or to none"):
        list(generator.clips([request, Request("y")], SETTINGS))
    with pytest.raises(ValueError, match="strength.*1.5.*0 to 1"):
        Settings(strength=1.5)
