"""The video autoencoder of the procedural world, at 32 x 32: images, then videos.

    python -m jvdit.train --config configs/world_vae.py --workdir runs/world/vae

A new network treats every frame as an image, so that images, of which a step holds
many more, teach it first what objects look like (Wan, arXiv:2503.20314, section 4.1).
The finished autoencoder is runs/world/vae/videos. On two cores of a Xeon, beside other
work, it took 34 minutes; 38.9 dB, SSIM 0.985 on 64 held-out clips.
"""

from jvdit import config as defaults


def stage():
    """What both stages have in common."""
    config = defaults.vae("world")
    config.data.validation = "world:val:9x32x32@8:64"
    # Objects are few pixels: what is lost of their edges must outweigh the background.
    config.loss.mse = 50.0
    config.loss.kl = 1e-3
    config.optim.name = "muon"
    config.optim.lr = 4e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 100
    config.checkpoint_every = 250
    config.evaluate_every = 500
    config.sample_every = 1000
    return config


def get_config():
    """Settings of the stages."""
    images = stage()
    images.steps = 1200
    images.data.sources = ("world:train:1x32x32@8:1000000",)
    images.data.pixel_budget = 32 * 32 * 32
    videos = stage()
    videos.steps = 2600
    videos.start_from = "{workdir}/images/model"
    videos.data.sources = (
        "world:train:5x32x32@8:1000000",
        "world:train:9x32x32@8:1000000",
    )
    # A step has 10 or 6 clips: a third of the steps are short ones.
    videos.data.weights = (10, 12)
    videos.data.pixel_budget = 6 * 9 * 32 * 32
    return defaults.stages(images=images, videos=videos)
