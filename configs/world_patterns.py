"""Attention patterns at equal compute, on clips of one object in the procedural world.

    python -m jvdit.train --config configs/world_patterns.py --workdir runs/patterns

Six small networks learn from the same clips with as many floating-point operations:
full, alternating and causal attention, each with long skips and without. The loss on
held-out clips, that each prints at its end, compares them (docs/results.md).
"""

from configs import world_box
from jvdit import config as defaults

BOX = "jvdit/box"
# Steps of as many operations (`DiT.flops`) for each, without skips and with.
PATTERNS = {
    "full": (("full",), (240, 228)),
    "alternating": (("spatial", "temporal"), (308, 290)),
    "causal": (("chunk_causal",), (266, 252)),
}
_TOKENS = 320  # of a clip, of one latent each


def network(patterns, skips, steps):
    """Settings of one network."""
    config = world_box.silent()
    config.dit.update(width=128, depth=4, num_heads=4, ffn_width=512)
    config.dit.update(patterns=patterns, chunk_frames=1, skips=skips)
    config.dit.scan_layers = False
    config.patch_size = (1, 1, 1)
    config.start_from = ""
    config.data.sources = ("{workdir}/latents",)
    config.data.weights = ()
    config.data.update(rows=8, token_budget=_TOKENS, text_budget=48, max_clips=1)
    config.data.validation = "{workdir}/latents#val"
    config.timesteps.shift_tokens = _TOKENS
    config.steps = steps
    config.evaluate_every = config.sample_every = 0
    return config


def get_config():
    """Settings of the stages."""
    latents = defaults.encode(
        "world:single:9x32x32@8:16384",
        vae=BOX,
        validation="world:single:9x32x32@8:256:1",
    )
    networks = {
        name + "_skips" * skips: network(patterns, skips, steps[skips])
        for skips in (False, True)
        for name, (patterns, steps) in PATTERNS.items()
    }
    return defaults.stages(latents=latents, **networks)
