"""The video autoencoder on one's own clips: their frames, the clips, then sharpness.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 17 --fps 8 \
        --size 64x96 --windows all --val 0.15
    python -m jvdit.train --config configs/clips_vae.py --workdir runs/clips/vae

The finished autoencoder is runs/clips/vae/videos. The last stage trains it on beside a
critic, which asks for texture where the errors alone settle for blur. It gives
runs/clips/vae/sharp and was not run yet (`clips_critic.py` shows what a critic does);
--config.order='("images", "videos")' leaves it out. Clips of another size or place:
--config.stages.videos.data.sources='("…#train:17x128x128@8",)' and so on.
"""

from jvdit import config as defaults

CLIPS = "data/clips"


def stage():
    """What all stages have in common."""
    config = defaults.vae("clips")
    config.data.validation = f"{CLIPS}#val:17x64x96@8"
    config.optim.name = "muon"
    config.optim.lr = 2e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 100
    config.checkpoint_every = 200
    config.evaluate_every = 200
    config.sample_every = 200
    return config


def get_config():
    """Settings of the stages."""
    images = stage()
    images.steps = 400
    images.data.sources = (f"{CLIPS}#train:1x64x96@8",)
    images.data.pixel_budget = 16 * 64 * 96
    videos = stage()
    videos.steps = 600
    videos.start_from = "{workdir}/images/model"
    videos.data.sources = (f"{CLIPS}#train:5x64x96@8", f"{CLIPS}#train:17x64x96@8")
    # A step has 7 or 2 clips: half of the steps are short ones.
    videos.data.weights = (7, 2)
    videos.data.pixel_budget = 2 * 17 * 64 * 96
    sharp = stage()
    sharp.steps = 400
    sharp.start_from = "{workdir}/videos/model"
    sharp.data.sources = videos.data.sources
    sharp.data.weights = videos.data.weights
    sharp.data.pixel_budget = videos.data.pixel_budget
    # The autoencoder only has its details to change.
    sharp.optim.lr = 5e-4
    sharp.critic.start = 1
    return defaults.stages(images=images, videos=videos, sharp=sharp)
