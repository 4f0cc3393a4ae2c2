"""Picture and sound in one step, in the procedural world: on from the model in the box.

    python -m jvdit.train --config configs/world_audio.py --workdir runs/world/audio
    python -m jvdit.train --config configs/world_sound.py --workdir runs/world/sound

Clips of one object at 9 x 32 x 32 and 8 fps with their sound. The finished model is
runs/world/sound/clips.
"""

from configs import world_box
from jvdit import config as defaults

AUDIO_VAE = "runs/world/audio"
BOX = "jvdit/box"


def clips():
    """Settings of the DiT."""
    config = world_box.get_config().stages.videos
    config.start_from = BOX
    config.steps = 4000
    config.data.sources = ("{workdir}/latents", "{workdir}/latents#train:1")
    config.data.weights = (0.5, 0.5)
    config.data.validation = "{workdir}/latents#val"
    config.data.rows = 32
    # A clip is 80 tokens of picture and 29 of sound.
    config.data.sound_budget = 29
    config.pairings = {
        "together": 0.35,
        "apart": 0.2,
        "picture_to_sound": 0.3,
        "sound_to_picture": 0.1,
        "picture": 0.05,
        "sound": 0.0,
    }
    config.cut = 0.1
    config.optim.lr = 2e-3
    return config


def get_config():
    """Settings of the stages."""
    latents = defaults.encode(
        "world:single:9x32x32@8:32768",
        vae=BOX,
        audio_vae=AUDIO_VAE,
        validation="world:single:9x32x32@8:256:1",
    )
    return defaults.stages(latents=latents, clips=clips())
