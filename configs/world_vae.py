"""The video autoencoder of the procedural world, at 32 x 32.

    python -m jvdit.train --config configs/world_vae.py --workdir runs/world/vae

Most clips are images or short: frames of one clip resemble each other, so that a batch
of many images teaches more than one of few long clips (Wan, arXiv:2503.20314, section
4.1, goes from images to short and then to long clips).
"""

from jvdit import config as defaults


def get_config():
    """Settings of the run."""
    config = defaults.vae("world")
    config.steps = 12_000
    # Objects are only a few pixels wide here, so that a latent has much to say.
    config.vae.latent_channels = 32
    config.data.sources = (
        "world:train:1x32x32@8:1000000",
        "world:train:5x32x32@8:1000000",
        "world:train:17x32x32@8:1000000",
    )
    # A step has 72, 14 or 4 clips: these weights make 40, 30 and 30 % of the steps.
    config.data.weights = (28.8, 4.2, 1.2)
    config.data.pixel_budget = 72 * 32 * 32
    config.data.validation = "world:val:17x32x32@8:64"
    # At 1e-3 it learns no colour at all: measured by overfitting 16 images.
    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = 100
    config.checkpoint_every = 200
    config.evaluate_every = 500
    config.sample_every = 1000
    return config
