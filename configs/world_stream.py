"""A causal network of the procedural world, whose films stream: on from the box.

    python -m jvdit.train --config configs/world_stream.py --workdir runs/world/stream
    python -m jvdit.sample "one object: …" --workdir runs/world/stream/clips --seconds 9

Each latent frame is a chunk with a noise level of its own (diffusion forcing), and sees
none that comes later. The finished model is runs/world/stream/clips.
"""

from configs import world_box
from jvdit import config as defaults

BOX = "jvdit/box"


def clips():
    """Settings of the DiT."""
    config = world_box.silent()
    config.start_from = BOX
    config.steps = 1500
    config.dit.patterns, config.dit.chunk_frames = ("chunk_causal",), 1
    config.forcing.update(share=0.9, clean=0.7)
    # A third of the clips begin amid others, as all but the first windows of a film do.
    config.given.update(first_frame=0.3, extend=0.35)
    config.given_noise = 0.02
    config.data.sources = ("{workdir}/latents",)
    config.data.weights = ()
    config.data.validation = "{workdir}/latents#val"
    config.matmul_precision = "bfloat16"
    config.optim.lr = 2e-3
    return config


def get_config():
    """Settings of the stages."""
    latents = defaults.encode(
        "world:single:9x32x32@8:32768",
        vae=BOX,
        validation="world:single:9x32x32@8:256:1",
    )
    return defaults.stages(latents=latents, clips=clips())
