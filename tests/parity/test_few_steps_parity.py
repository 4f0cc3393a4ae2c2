"""Models distilled to few steps are sampled as their authors and diffusers do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import ROUNDINGS, assert_close
from einops import rearrange
from tiny_models import PROMPT, draw, pipeline

from jvdit.diffusion.solvers import clip_noise
from jvdit.generation.generator import Generator
from jvdit.generation.request import Request
from jvdit.generation.settings import PRESETS, Settings
from jvdit.shapes import Tokens
from jvdit.sharding import make_mesh
from jvdit.weights.opening import open_bundle

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SEED, WORDS = 3, 16
TOKENS = "(f h w) (p q c) -> c f (h p) (w q)"


def fresh_noise(step):
    """The noise that our solver adds at a step, in their layout."""
    keys = jax.random.fold_in(jax.random.key(np.uint32(SEED)), step)[None, None]
    noise = clip_noise(keys, Tokens(jnp.zeros((1, 18, 64)), jnp.zeros((1, 18, 3))))
    noise = rearrange(np.asarray(noise[0]), TOKENS, h=2, w=3, p=2, q=2)
    return torch.from_numpy(noise)[None]


def theirs(pipe, noise, timesteps, shift, solver, boundary, monkeypatch):
    """Their network and scheduler, step by step; the noise is ours."""
    kinds = {
        "renoise": diffusers.FlowMatchLCMScheduler,
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    }
    scheduler = kinds[solver](shift=shift)
    scheduler.set_timesteps(sigmas=[x / 1000 for x in timesteps])
    states = pipe.encode_prompt(PROMPT, None, False, max_sequence_length=WORDS)[0]
    x, kept, network = torch.from_numpy(noise), [], diffusers.schedulers
    for i, t in enumerate(scheduler.timesteps):
        monkeypatch.setattr(
            network.scheduling_flow_match_lcm,
            "randn_tensor",
            lambda *args, i=i, **named: fresh_noise(i),
        )
        low = boundary and t < 1000 * boundary
        dit = pipe.transformer_2 if low else pipe.transformer
        with torch.no_grad():
            velocity = dit(x, t[None], states, return_dict=False)[0]
        x = scheduler.step(velocity, t, x, return_dict=False)[0]
        kept.append(x.numpy()[0])
    return kept, scheduler.sigmas.numpy()


@pytest.mark.parametrize(
    ("preset", "timesteps", "shift", "boundary"),
    [
        ("lightx2v-4", (1000, 750, 500, 250), 5.0, None),
        ("lightx2v-2+2", (1000, 750, 500, 250), 5.0, 0.9),
        ("lightning-2+2", (1000, 750, 500, 250), 5.0, 0.875),
        ("fastwan-3", (1000, 757, 522), 1.0, None),
    ],
)
def test_presets(preset, timesteps, shift, boundary, tmp_path, monkeypatch):
    pipe = pipeline(diffusers.WanPipeline, 8.0, experts=boundary)
    pipe.save_pretrained(tmp_path)
    noise = draw("noise", 1, 16, 3, 4, 6)
    solver = PRESETS[preset]["solver"]
    want, sigmas = theirs(pipe, noise, timesteps, shift, solver, boundary, monkeypatch)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = open_bundle(tmp_path, mesh, dtype=jnp.float32)
    generator = Generator(dataclasses.replace(model, text_length=WORDS), mesh)
    settings = Settings(preset=preset).complete(model.defaults)
    assert settings.guidance_scale == settings.guidance_scale_2 == 1
    np.testing.assert_allclose([*settings.levels, 0], sigmas, atol=1e-6)
    seen = []
    generator.latents(
        [Request(PROMPT, "", 9, 32, 48, seed=SEED)],
        noise=[rearrange(noise[0], "c f h w -> f h w c")],
        on_step=lambda done, total, x: seen.append(x[0]),
        **settings.solving,
    )
    assert len(seen) == len(want) == len(timesteps)
    for ours, other in zip(seen, want, strict=True):
        ours = rearrange(ours, TOKENS, h=2, w=3, p=2, q=2)
        assert_close(ours, other, ROUNDINGS)
    if boundary:
        halves = generator.timed(settings.levels).experts.spans(4)
        assert halves == {"dit": (0, 2), "dit_low": (2, 4)}
