"""What a critic does to a video autoencoder: the same steps on clips with and without.

    python tools/prepare_clips.py VIDEOS --out data/clips --frames 17 --fps 8 \
        --size 64x96 --windows all --val 0.15
    python -m jvdit.train --config configs/clips_critic.py --workdir runs/critic
    python -m jvdit.evaluate --vae runs/critic/plain --data 'data/clips#val:17x64x96@8'
    python -m jvdit.evaluate --vae runs/critic/sharp --data 'data/clips#val:17x64x96@8'

The autoencoder of the procedural world, from the box, learns real clips; from there one
training goes on with the errors alone, and another beside a critic.

On 330 windows of public clips the last two stages took 4:29 and 6:03 of two cores,
beside other work. Of 35 held-out clips, without and with the critic: 27.8
and 27.5 dB, SSIM .866 and .863, sharpness .54 and .57 of the original's, error from
frame to frame .019 both: a little sharper after 100 steps, for a little more error.
"""

from jvdit import config as defaults

CLIPS = "data/clips"
BOX = "jvdit/box/vae"


def stage(steps, start_from):
    """Settings of one training."""
    config = defaults.vae("world")
    config.start_from, config.steps = start_from, steps
    config.data.sources = (f"{CLIPS}#train:5x64x96@8", f"{CLIPS}#train:17x64x96@8")
    # A step has 7 or 2 clips: half of the steps are short ones.
    config.data.weights = (7, 2)
    config.data.pixel_budget = 2 * 17 * 64 * 96
    config.data.validation = f"{CLIPS}#val:17x64x96@8"
    config.optim.name = "muon"
    config.optim.schedule = "linear"
    config.optim.warmup = 20
    # Short runs: the average forgets soon.
    config.optim.ema = 0.98
    config.checkpoint_every = 100
    config.evaluate_every = config.sample_every = steps
    return config


def get_config():
    """Settings of the stages."""
    real = stage(300, BOX)
    real.optim.lr = 2e-3
    plain, sharp = (stage(100, "{workdir}/real/model") for _ in range(2))
    plain.optim.lr = sharp.optim.lr = 1e-3
    sharp.critic.start = 1
    return defaults.stages(real=real, plain=plain, sharp=sharp)
