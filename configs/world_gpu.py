"""The procedural world at 9 x 32 x 32, whole, on one GPU: autoencoder, latents, DiT.

    python -m jvdit.train --config configs/world_gpu.py --workdir runs/world

The stages of `world_vae.py` and `world_dit.py` with larger batches, and a DiT that is
wider and looks at single latents. The finished model is runs/world/videos.

On one H200, compilation included: autoencoder 64 and 85 s (41.5 dB, SSIM 0.991),
latents 60 s, pictures 77 s (the first 972 of the 1,600 steps), clips 179 s. All at once
is right in .85 of the clips of test (real: .96).
"""

from configs import world_dit, world_vae
from jvdit import config as defaults

_FRAME = 32 * 32  # pixels, and 8 x 8 latents


def busy(config, steps):
    """A stage of so many steps, fed by processes: thousands of small clips a second."""
    config.steps = config.sample_every = steps
    config.data.workers, config.data.threads = 12, 1
    config.log_every = 100
    config.checkpoint_every = config.evaluate_every = 1000
    return config


def autoencoder(config, frames, steps):
    """A stage of `world_vae.py` with so many frames in a step."""
    config.data.pixel_budget = frames * _FRAME
    return busy(config, steps)


def transformer(config, rows, frames, steps):
    """A stage of `world_dit.py`: so many clips of so many latent frames in a step."""
    config.dit = defaults.flow("world-m").dit
    config.dit.update(
        dtype="bfloat16", scan_layers=True, position_scale=(4.0, 1.0, 1.0)
    )
    config.patch_size = (1, 1, 1)
    config.matmul_precision = "default"
    config.data.rows, config.data.token_budget = rows, frames * 8 * 8
    return busy(config, steps)


def get_config():
    """Settings of the stages."""
    vae = world_vae.get_config().stages
    vae.videos.start_from = "{workdir}/vae_images/model"
    latents = defaults.encode(
        "world:train:9x32x32@8:65536",
        vae="{workdir}/vae_videos",
        validation="world:val:9x32x32@8:256",
    )
    dit = world_dit.get_config().stages
    # So much more is seen of clips that they draw as well as pictures do.
    dit.videos.given.first_frame = 0.7
    dit.videos.sample.update(draft=False, pictures="")
    return defaults.stages(
        vae_images=autoencoder(vae.images, frames=256, steps=1500),
        vae_videos=autoencoder(vae.videos, frames=32 * 9, steps=2700),
        latents=latents,
        images=transformer(dit.images, rows=512, frames=1, steps=1600),
        videos=transformer(dit.videos, rows=128, frames=5, steps=3150),
    )
