"""Goes on with the model in the box: as many steps as one likes.

    python -m jvdit.train --config configs/box_more.py --workdir runs/box
    python tools/fill_box.py runs/box/all

The last stage of `world_box.py`, from the weights and with the autoencoders of the box.
"""

from configs import world_box
from jvdit import config as defaults

BOX = "jvdit/box"


def get_config():
    """Settings of the stages."""
    whole = world_box.get_config().stages
    encoded = [name for name in whole if name.startswith(("latents_", "views"))]
    stages = {name: whole[name] for name in (*encoded, "all")}
    for name in encoded:
        stages[name].update(vae=BOX, audio_vae=f"{BOX}/audio_vae")
    more = stages["all"]
    more.start_from = BOX
    # At twice this rate, 1,500 steps lost more of what it knew than they taught.
    more.optim.lr = 1e-3
    # Sound for a picture is what it does best; pictures that move are the weaker half.
    more.data.weights = (0.42, 0.06, 0.10, 0.03, 0.21, 0.09, 0.09)
    more.pairings.update(
        together=0.45,
        apart=0.05,
        picture_to_sound=0.15,
        sound_to_picture=0.05,
        picture=0.3,
    )
    return defaults.stages(**stages)
