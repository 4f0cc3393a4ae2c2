"""Picture and sound in one step, in the procedural world: on from the model in the box.

    python -m jvdit.train --config configs/world_sound.py --workdir runs/world/sound
    python -m jvdit.evaluate --workdir runs/world/sound/clips --split single \
        --given picture --sound_sync_scale 2

Clips of one object at 9 x 32 x 32 and 8 fps with their sound, of the audio autoencoder
in the box (`world_audio.py`). The finished model is runs/world/sound/clips.

On two cores of an EPYC, beside other work, latents took 8 minutes and 1,850 steps
(whose learning rate was brought down early) 55. Of 128 clips .388 of the bounces of a
given, real picture are heard within 40 ms (real sound: .988, another clip's: .075),
.733 within a frame (.24); guided in step by 2 .475 and .799. The right material sounds
in .86.
"""

from configs import world_box
from jvdit import config as defaults

AUDIO_VAE = "jvdit/box/sound"
BOX = "jvdit/box"


def clips():
    """Settings of the DiT."""
    config = world_box.get_config().stages.videos
    config.start_from = BOX
    config.steps = 2400
    config.data.sources = ("{workdir}/latents", "{workdir}/latents#train:1")
    config.data.weights = (0.5, 0.5)
    config.data.validation = "{workdir}/latents#val"
    config.data.rows = 32
    # A clip is 80 tokens of picture and 29 of sound.
    config.data.sound_budget = 29
    config.pairings = {
        "together": 0.3,
        "apart": 0.15,
        "picture_to_sound": 0.4,
        "sound_to_picture": 0.05,
        "picture": 0.1,
        "sound": 0.0,
    }
    config.matmul_precision = "default"
    # Guidance in step: nearly as many bounces again.
    config.sample.sound_sync_scale = 2.0
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
