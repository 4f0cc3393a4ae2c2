"""The video autoencoder of the procedural world, at 32 x 32.

    python -m jvdit.train --config configs/world_vae.py --workdir runs/world/vae

Most clips are short: frames of one clip resemble each other, so that a batch of many
short clips teaches more than one of few long ones.
"""

from jvdit import config as defaults


def get_config():
    """Settings of the run."""
    config = defaults.vae("world")
    config.steps = 4000
    config.data.sources = (
        "world:train:9x32x32@8:1000000",
        "world:train:17x32x32@8:1000000",
    )
    config.data.weights = (0.8, 0.2)
    config.data.validation = "world:val:17x32x32@8:64"
    config.data.batch_size = 8
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup = 100
    config.checkpoint_every = 200
    config.evaluate_every = 500
    config.sample_every = 1000
    return config
