"""Everything once, in a few minutes on two CPU cores: autoencoder, latents, DiT.

    python -m jvdit.train --config configs/quickstart.py --workdir runs/quickstart
    python -m jvdit.sample "one object: a large red rubber circle moving quickly up on \
a grey plain background." --workdir runs/quickstart/dit

Far too short to obey prompts; `world_vae.py` and `world_dit.py` are the same, longer.
"""

from configs import world_dit, world_vae
from jvdit import config as defaults


def get_config():
    """Settings of the runs, one after another."""
    vae = world_vae.get_config().stages
    for stage in (vae.images, vae.videos):
        stage.steps = 300
        stage.optim.warmup = 20
        stage.sample_every = 300
    latents = defaults.encode(
        "world:train:17x32x32@16:4096",
        vae="{workdir}/videos",
        validation="world:val:17x32x32@16:48",
    )
    dit = world_dit.get_config()
    dit.steps = 500
    dit.optim.warmup = 20
    dit.data.sources = ("{workdir}/latents",)
    dit.data.validation = "{workdir}/latents#val"
    return defaults.stages(
        images=vae.images, videos=vae.videos, latents=latents, dit=dit
    )
