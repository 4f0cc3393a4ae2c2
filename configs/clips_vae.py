"""The video autoencoder on one's own clips, as tools/prepare_clips.py made them.

python -m jvdit.train --config configs/clips_vae.py --workdir runs/clips/vae \
        --config.data.sources='("data/clips",)' \
        --config.data.validation='data/clips#val'
"""

from jvdit import config as defaults


def get_config():
    """Settings of the run."""
    config = defaults.vae("world")
    config.steps = 10_000
    config.data.sources = ("data/clips",)
    config.data.validation = "data/clips#val"
    config.data.pixel_budget = 2 * 17 * 64 * 96
    config.optim.lr = 2e-4
    config.optim.schedule = "cosine"
    config.optim.warmup = 200
    return config
