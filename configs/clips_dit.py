"""Text to video on one's own clips, after `clips_vae.py`.

    python -m jvdit.encode --source data/clips --validation 'data/clips#val' \
        --vae runs/clips/vae/videos --out runs/clips/latents
    python -m jvdit.train --config configs/clips_dit.py --workdir runs/clips/dit

22 minutes on two cores give the colours of a caption. Many more steps learn a hundred
clips by heart; a model that generalises needs millions of clips.
"""

from jvdit import config as defaults


def get_config():
    """Settings of the run."""
    config = defaults.flow("world-s", "world")
    config.steps = 700
    config.data.sources = ("runs/clips/latents",)
    config.data.validation = "runs/clips/latents#val"
    # A clip of 17 x 64 x 96 pixels is 5 x 8 x 12 tokens.
    config.data.rows = 8
    config.data.token_budget = 480
    config.data.max_clips = 1
    config.data.text_length = 64
    config.data.text_budget = 64
    config.dit.position_scale = (4.0, 1.0, 1.0)
    config.matmul_precision = "bfloat16"
    config.optim.name = "muon"
    config.optim.lr = 3e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 50
    config.checkpoint_every = 100
    config.evaluate_every = 100
    config.sample_every = 350
    config.sample.height = 64
    config.sample.width = 96
    return config
