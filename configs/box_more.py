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
    # It has learned at a high rate before.
    more.optim.lr = 1e-3
    # Sound for a picture is what it does best. Its pictures are the weaker half.
    more.data.weights = (0.26, 0.08, 0.20, 0.06, 0.26, 0.07, 0.07)
    more.pairings.update(
        together=0.3,
        apart=0.05,
        picture_to_sound=0.25,
        sound_to_picture=0.1,
        picture=0.3,
    )
    return defaults.stages(**stages)
