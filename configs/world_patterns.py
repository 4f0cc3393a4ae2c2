"""Attention patterns at equal compute, on clips of one object in the procedural world.

    python -m jvdit.train --config configs/world_patterns.py --workdir runs/patterns

Six small networks learn from the same clips with as many floating-point operations:
full, alternating and causal attention, each with long skips and without. The loss on
held-out clips, that each prints at its end, compares them (docs/results.md).
"""

from configs import world_box
from jvdit import config as defaults
from jvdit.models.dit import DiT

BOX = "jvdit/box"
PATTERNS = {
    "full": ("full",),
    "alternating": ("spatial", "temporal"),
    "causal": ("chunk_causal",),
}
_CHANNELS = {"in_channels": 12, "out_channels": 12, "text_width": 128}
# Of a clip: tokens of one latent each, latent frames, and pieces of text.
_TOKENS, _FRAMES, _TEXT = 320, 5, 48


def network(patterns=("full",), skips=False):
    """Settings of one network, which takes as many steps as its compute allows."""
    config = world_box.silent()
    size = {"width": 128, "depth": 4, "num_heads": 4, "ffn_width": 512}
    size |= {"patterns": patterns, "chunk_frames": 1, "skips": skips}
    config.dit.update(**size)
    config.dit.scan_layers = False
    config.patch_size = (1, 1, 1)
    config.start_from = ""
    config.data.sources = ("{workdir}/latents",)
    config.data.weights = ()
    config.data.update(rows=8, token_budget=_TOKENS, text_budget=_TEXT, max_clips=1)
    config.data.validation = "{workdir}/latents#val"
    config.timesteps.shift_tokens = _TOKENS

    def cost(**more):
        return DiT(**size | _CHANNELS | more).flops(_TOKENS, _TEXT, "weights", _FRAMES)

    config.steps = round(600 * cost(patterns=(), skips=False) / cost())
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
        name + "_skips" * skips: network(patterns, skips)
        for skips in (False, True)
        for name, patterns in PATTERNS.items()
    }
    return defaults.stages(latents=latents, **networks)
