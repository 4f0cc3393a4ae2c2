"""Text to video in the procedural world, at 17 x 32 x 32.

    python -m jvdit.encode --source world:train:17x32x32@16:65536 \
        --validation world:val:17x32x32@16:256 --vae runs/world/vae/videos \
        --out runs/world/latents
    python -m jvdit.train --config configs/world_dit.py --workdir runs/world/dit

A clip is 5 x 2 x 2 tokens, so that thousands of steps fit into an hour on two cores.
"""

from jvdit import config as defaults

PROMPTS = (
    "one object: a large red rubber circle moving quickly up on a grey plain "
    "background.",
    "one object: a large blue metal square moving slowly right on a black plain "
    "background.",
    "one object: a small yellow glass triangle moving quickly left on a black striped "
    "background.",
    "one object: a large green wooden diamond moving slowly down on a pale plain "
    "background.",
    "one object: a large purple rubber cross moving quickly down-right on a grey "
    "checkered background.",
    "two objects: a large cyan metal circle moving slowly left, a large orange wooden "
    "square moving slowly right on a black plain background.",
    "two objects: a small pink rubber triangle moving quickly up, a large green glass "
    "circle moving slowly down on a grey plain background.",
    "one object: a small orange glass circle moving quickly up-left on a pale striped "
    "background.",
)


def get_config():
    """Settings of the run."""
    config = defaults.flow("world-s", "world")
    config.patch_size = (1, 4, 4)
    config.steps = 8000
    config.data.sources = ("runs/world/latents",)
    config.data.validation = "runs/world/latents#val"
    config.data.rows = 48
    config.data.token_budget = 20
    config.data.max_clips = 1
    config.data.text_length = 48
    config.data.text_budget = 48
    # What moves where is decided at much noise.
    config.timesteps.shift = 3.0
    config.sample.guidance_scale = 2.5
    # One second of the clip is to RoPE what one cell is in height and width.
    config.dit.position_scale = (4.0, 1.0, 1.0)
    # As a TPU multiplies by default; a CPU with matrix units is faster so.
    config.matmul_precision = "bfloat16"
    config.optim.lr = 2e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 200
    config.checkpoint_every = 250
    config.evaluate_every = 500
    config.sample_every = 1000
    config.sample.prompts = PROMPTS
    config.sample.scored = 64
    config.sample.fps = 16.0
    config.sample.height = config.sample.width = 32
    return config
