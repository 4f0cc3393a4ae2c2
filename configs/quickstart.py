"""Everything once, in 20 to 30 minutes on two cores: autoencoder, latents, DiT.

    python -m jvdit.train --config configs/quickstart.py --workdir runs/quickstart
    python -m jvdit.sample "one object: a large red rubber circle moving quickly up on \
a grey plain background." --workdir runs/quickstart/dit

Colours and backgrounds are those of the prompt, but it is far too short to obey it as a
whole; `world_vae.py` and `world_dit.py` are the same, longer.
"""

from configs import world_dit, world_vae
from jvdit import config as defaults


def get_config():
    """Settings of the runs, one after another."""
    vae = world_vae.get_config().stages
    vae.videos.start_from = "{workdir}/vae_images/model"
    latents = defaults.encode(
        "world:train:9x32x32@8:8192",
        vae="{workdir}/vae_videos",
        validation="world:val:9x32x32@8:48",
    )
    dit = world_dit.get_config().stages
    dit.videos.sample.scored = 0
    for stage in (vae.images, vae.videos, dit.images, dit.videos):
        stage.steps = stage.sample_every = 300
        stage.optim.warmup = 20
    return defaults.stages(
        vae_images=vae.images,
        vae_videos=vae.videos,
        latents=latents,
        images=dit.images,
        dit=dit.videos,
    )
