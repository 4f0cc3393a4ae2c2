"""Text to video in the procedural world, at 9 x 32 x 32.

    python -m jvdit.train --config configs/world_dit.py --workdir runs/world/dit

Clips become latents, of the autoencoder of `world_vae.py`; then one DiT learns from
their first frames to draw what prompts name, and another, from its weights, to move it.
The finished model is runs/world/dit/videos; the first draws the first frames for it.

On two cores of a Xeon: latents 6 minutes, pictures 43, clips 41 (the first 1,600 steps
with `given.first_frame` at .6). All at once is right in .14 of the clips of test (real:
.97).
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


VAE = "runs/world/vae/videos"


def videos():
    """Settings of the DiT."""
    config = defaults.flow("world-s", "world")
    config.steps = 4200
    config.data.sources = ("{workdir}/latents",)
    config.data.validation = "{workdir}/latents#val"
    # A clip is 5 x 4 x 4 tokens.
    config.data.rows = 32
    config.data.token_budget = 80
    config.data.max_clips = 1
    config.data.text_length = 48
    config.data.text_budget = 48
    # Clips make the network forget how to draw shapes. So the first stage's draws the
    # first frames, and this one learns above all to go on from them.
    config.given.first_frame = 0.9
    # What moves where is decided at much noise.
    config.timesteps.shift = 3.0
    config.sample.guidance_scale = 2.5
    config.sample.draft = True
    # One second of the clip is to RoPE what one cell is in height and width.
    config.dit.position_scale = (4.0, 1.0, 1.0)
    # As a TPU multiplies by default; a CPU with matrix units is faster so.
    config.matmul_precision = "bfloat16"
    # Goes on where AdamW all but stops.
    config.optim.name = "muon"
    config.optim.lr = 3e-3
    config.optim.schedule = "linear"
    config.optim.warmup = 100
    config.checkpoint_every = 250
    config.evaluate_every = 500
    config.sample_every = 1500
    config.sample.prompts = PROMPTS
    config.sample.scored = 64
    config.sample.frames = 9
    config.sample.height = config.sample.width = 32
    return config


def images():
    """Settings of the first stage: first frames, a quarter of the cost of clips."""
    config = videos()
    config.steps = 3200
    config.data.sources = ("{workdir}/latents#train:1",)
    config.data.validation = "{workdir}/latents#val:1"
    config.data.rows = 160
    config.data.token_budget = 16
    config.given.first_frame = 0.0
    # Shapes are decided at less noise than what moves where.
    config.timesteps.shift = 2.0
    config.sample.frames = 1
    config.sample.scored = 0
    config.sample.draft = False
    return config


def get_config():
    """Settings of the stages."""
    latents = defaults.encode(
        "world:train:9x32x32@8:65536", VAE, validation="world:val:9x32x32@8:256"
    )
    then = videos()
    then.start_from = then.sample.pictures = "{workdir}/images/model"
    return defaults.stages(latents=latents, images=images(), videos=then)
