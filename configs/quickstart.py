"""Teaches the model in the box gravity: 6:35 on one core of an EPYC.

    python -m jvdit.train --config configs/quickstart.py --workdir runs/quickstart

The model in the box has seen objects fly and bounce, and none fall. Two stages: clips
of falling objects become latents, and its network goes on from its weights with them.
`runs/quickstart/dit/samples` shows the same prompts and seeds before and after.

    python -m jvdit.sample "one object: a large blue rubber circle moving slowly right \
on a pale plain background, falling under gravity." --workdir runs/quickstart/dit
"""

from configs import world_box
from jvdit import config as defaults
from jvdit.box import FOLDER

_BACKGROUND = "on a pale plain background, falling under gravity."
PROMPTS = tuple(
    f"one object: a large {object} moving {way} {_BACKGROUND}"
    for object, way in (
        ("blue rubber circle", "slowly right"),
        ("red metal square", "quickly left"),
        ("green glass triangle", "slowly up"),
    )
)


def get_config():
    """Settings of the two stages."""
    latents = defaults.encode(
        "world:falling:9x32x32@8:4096",
        vae=str(FOLDER / "vae"),
        audio_vae=str(FOLDER / "audio_vae"),
        validation="world:falling:9x32x32@8:64:1",
    )
    dit = world_box.everything()
    dit.start_from = str(FOLDER)
    dit.steps = 250
    dit.data.sources, dit.data.weights = ("{workdir}/latents",), ()
    # Rows of one clip and its sound: no pictures beside it.
    dit.data.update(token_budget=80, sound_budget=29, max_clips=1, text_budget=48)
    dit.data.update(rows=20, validation="{workdir}/latents#val")
    dit.given.update(dict.fromkeys(dit.given, 0.0) | {"first_frame": 0.75})
    dit.optim.lr, dit.optim.warmup = 1e-3, 20
    dit.evaluate_every = dit.checkpoint_every = 100
    dit.sample_every = 125
    dit.sample.prompts = PROMPTS
    return defaults.stages(latents=latents, dit=dit)
