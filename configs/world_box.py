"""The model in the box: what `jvdit.sample` draws with where no other is named.

    python -m jvdit.train --config configs/world_box.py --workdir runs/box
    python tools/fill_box.py runs/box/videos

Clips of one and two objects in the procedural world, at 32 x 32 and 8 fps. Its card,
jvdit/box/README.md, tells what it took and what the model scores.
"""

from configs import world_dit, world_vae
from jvdit import config as defaults

PROMPTS = tuple(x for x in world_dit.PROMPTS if x.startswith("one"))[:4] + tuple(
    x for x in world_dit.PROMPTS if x.startswith("two")
)
_KINDS = {"single": 32_768, "pair": 16_384}  # clips
# Another seed of the world than that of the clips to learn from.
_HELD_OUT = "world:single:9x32x32@8:256:1"


def transformer(config):
    """What both stages of the DiT have in common."""
    config.dit.scan_layers = True
    config.data.weights = (0.6, 0.4)
    config.evaluate_every = config.checkpoint_every = 250
    config.sample_every = 1000
    config.sample.update(prompts=PROMPTS, scored=0, steps=20, draft=False, pictures="")
    return config


def get_config():
    """Settings of the stages."""
    vae = world_vae.get_config().stages
    vae.videos.steps = 2000
    vae.videos.start_from = "{workdir}/vae_images/model"
    latents = {
        f"latents_{kind}": defaults.encode(
            f"world:{kind}:9x32x32@8:{clips}",
            vae="{workdir}/vae_videos",
            validation=_HELD_OUT,
        )
        for kind, clips in _KINDS.items()
    }
    dit = world_dit.get_config().stages
    sources = tuple("{workdir}/" + name for name in latents)
    images, videos = transformer(dit.images), transformer(dit.videos)
    images.data.sources = tuple(f"{name}#train:1" for name in sources)
    images.data.validation = f"{sources[0]}#val:1"
    images.steps = 400
    # A third of the tokens are pictures', so that clips don't make the network forget
    # shapes.
    videos.data.sources = sources + images.data.sources
    videos.data.weights = (0.22, 0.1, 0.42, 0.26)
    videos.data.update(max_clips=5, text_budget=192, validation=f"{sources[0]}#val")
    videos.start_from = "{workdir}/images/model"
    videos.given.first_frame, videos.sample.draft = 0.9, True
    # What moves where is decided at much noise, and the shapes of it at little.
    videos.timesteps.update(
        shift=2.0, std=1.4, shift_tokens=80, shift_range=(1.5, 12.0)
    )
    videos.sample.guidance_scale = 2.0
    videos.steps = 11_000
    return defaults.stages(
        vae_images=vae.images,
        vae_videos=vae.videos,
        **latents,
        images=images,
        videos=videos,
    )
