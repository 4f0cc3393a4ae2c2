"""Everything once, in twelve minutes on two cores: autoencoder, latents, DiT.

    python -m jvdit.train --config configs/quickstart.py --workdir runs/quickstart
    python -m jvdit.sample "one object: a large purple rubber circle moving quickly \
down-right on a grey checkered background." --workdir runs/quickstart/dit

The stages of `world_vae.py` and `world_dit.py` with smaller networks, on clips of one
object. Its colour is that of the prompt in 1.00 of 64 clips, its size in .98, its
direction in .72 (`jvdit.evaluate --split single`); shapes take longer.
"""

from configs import world_dit, world_vae
from jvdit import config as defaults


def get_config():
    """Settings of the runs, one after another."""
    vae = world_vae.stage()
    vae.steps = vae.sample_every = 800
    vae.vae.update(encoder_width=16, decoder_width=24)
    vae.optim.warmup = 20
    vae.data.sources = ("world:single:9x32x32@8:1000000",)
    vae.data.validation = "world:single:9x32x32@8:48:1"
    vae.data.pixel_budget = 3 * 9 * 32 * 32
    latents = defaults.encode(
        "world:single:9x32x32@8:12000",
        vae="{workdir}/vae",
        validation="world:single:9x32x32@8:48:1",
    )
    dit = world_dit.videos()
    dit.steps = dit.sample_every = 1000
    dit.dit.update(width=128, depth=3, ffn_width=512)
    dit.optim.lr, dit.optim.warmup = 6e-3, 20
    dit.data.text_length = dit.data.text_budget = 32
    # It learns to draw first frames as well, from which its own clips then start.
    dit.first_frame = 0.8
    dit.sample.prompts = tuple(x for x in world_dit.PROMPTS if x.startswith("one"))
    dit.sample.guidance_scale = 4.0
    dit.sample.scored = 0
    return defaults.stages(vae=vae, latents=latents, dit=dit)
