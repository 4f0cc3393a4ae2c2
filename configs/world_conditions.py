"""One network for every task: picture, sound, and all conditions but edges.

    python -m jvdit.train --config configs/world_conditions.py --workdir runs/world/all
    python tools/given_table.py --workdir runs/world/all/clips --n 48
    python tools/film_drift.py --workdir runs/world/all/clips --frames 400 --n 2

It goes on from the silent model in the box, as `world_sound.py` does, with latents that
keep the views which conditions need. The finished model is runs/world/all/clips.

The network of docs/conditions.md had these settings for its last 1,100 of 2,358 steps,
after 1,249 with sound and first frames alone (and clips of two objects among them), in
two hours of two cores of an EPYC beside much other work. It was stopped before its
learning rate came down: the steps below are more than it had.
"""

from configs import world_sound
from jvdit import config as defaults


def clips():
    """Settings of the DiT."""
    config = world_sound.clips()
    config.steps = 3000
    config.data.sources = (
        "{workdir}/latents",
        "{workdir}/latents#train:1",
        "{workdir}/views",
    )
    config.data.weights = (0.34, 0.3, 0.36)
    # Clips of 80 tokens of picture and 29 of sound, and what lies beside some of them.
    config.data.update(
        rows=16, token_budget=160, sound_budget=58, text_budget=384, max_clips=10
    )
    config.given.update(
        first_frame=0.75,
        prefix=0.12,
        inpaint=0.1,
        extend=0.12,
        suffix=0.14,
        keyframes=0.14,
        reference=0.08,
        interpolate=0.16,
        upscale=0.2,
    )
    config.pairings = {
        "together": 0.25,
        "apart": 0.1,
        "picture_to_sound": 0.45,
        "sound_to_picture": 0.12,
        "picture": 0.08,
        "sound": 0.0,
    }
    return config


def get_config():
    """Settings of the stages."""
    views = defaults.encode(
        "world:single:9x32x32@8:6144",
        vae=world_sound.BOX,
        audio_vae=world_sound.AUDIO_VAE,
        views=("stills", "slow", "small"),
    )
    latents = world_sound.get_config().stages.latents
    return defaults.stages(latents=latents, views=views, clips=clips())
