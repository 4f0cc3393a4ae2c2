"""The model in the box: what `jvdit.sample` draws and plays where no other is named.

    python -m jvdit.train --config configs/world_box.py --workdir runs/box
    python tools/fill_box.py runs/box/all

Clips of one and two objects in the procedural world, of 9 frames of 32 x 32 pixels at 8
fps, and some that are taller, wider and longer, with their sound. Autoencoders and
latents; a silent network that learns pictures and then clips; and from its weights the
network of the box, for all that a request can give but a guide, a camera path and spans
of a sound. Its card, jvdit/box/README.md, tells what it took and what the model scores.
"""

from configs import world_audio, world_dit, world_vae
from jvdit import config as defaults

PROMPTS = tuple(x for x in world_dit.PROMPTS if x.startswith("one"))[:4] + tuple(
    x for x in world_dit.PROMPTS if x.startswith("two")
)
_KINDS = {"single": 32_768, "pair": 16_384}  # clips
_LATENTS = tuple(f"{{workdir}}/latents_{kind}" for kind in _KINDS)
_SIZES = {"tall": "9x48x32@8:6144", "long": "17x32x48@8:6144"}
# Another seed of the world than that of the clips to learn from.
_HELD_OUT = "world:single:9x32x32@8:256:1"


def transformer(config):
    """What both stages of the DiT have in common."""
    config.dit.scan_layers = True
    config.evaluate_every = config.checkpoint_every = 250
    config.sample_every = 1000
    config.sample.update(prompts=PROMPTS, scored=0, steps=20, draft=False, pictures="")
    return config


def silent():
    """Settings of the network without sound: clips, and pictures beside them."""
    config = transformer(world_dit.get_config().stages.videos)
    pictures = tuple(f"{name}#train:1" for name in _LATENTS)
    # A third of the tokens are pictures', so that clips don't make the network forget
    # shapes.
    config.data.sources = _LATENTS + pictures
    config.data.weights = (0.22, 0.1, 0.42, 0.26)
    config.data.update(max_clips=5, text_budget=192, validation=f"{_LATENTS[0]}#val")
    config.start_from = "{workdir}/images/model"
    config.given.first_frame, config.sample.draft = 0.9, True
    # What moves where is decided at much noise, and the shapes of it at little.
    config.timesteps.update(
        shift=2.0, std=1.4, shift_tokens=80, shift_range=(1.5, 12.0)
    )
    config.sample.guidance_scale = 2.0
    config.steps = 11_000
    return config


def everything():
    """Settings of the network of the box: picture, sound, and what may be given."""
    config = silent()
    config.start_from = "{workdir}/videos/model"
    config.steps = 5000
    config.data.sources += ("{workdir}/views",)
    config.data.sources += tuple(f"{{workdir}}/latents_{name}" for name in _SIZES)
    config.data.weights = (0.28, 0.08, 0.16, 0.06, 0.30, 0.06, 0.06)
    # Three clips of 80 tokens of picture and 29 of sound, or one of 216 and 54; and
    # what lies beside some of them.
    config.data.update(
        rows=12, token_budget=240, sound_budget=87, text_budget=512, max_clips=14
    )
    config.given.update(
        first_frame=0.75,
        prefix=0.1,
        inpaint=0.08,
        extend=0.1,
        suffix=0.12,
        keyframes=0.12,
        reference=0.06,
        interpolate=0.14,
        upscale=0.16,
        edges=0.12,
    )
    config.pairings = {
        "together": 0.2,
        "apart": 0.1,
        "picture_to_sound": 0.5,
        "sound_to_picture": 0.12,
        "picture": 0.08,
        "sound": 0.0,
    }
    # When something sounds is decided at much noise: at the times of pictures 2,358
    # steps heard .39 of the bounces within 40 ms, and with later ones 1,000 more .67.
    config.timesteps.sound_shift = 3.0
    config.optim.lr = 2e-3
    config.sample.sound_sync_scale = 2.0
    return config


def get_config():
    """Settings of the stages."""
    vae = world_vae.get_config().stages
    vae.videos.steps = 2000
    vae.videos.start_from = "{workdir}/vae_images/model"
    autoencoders = {"vae": "{workdir}/vae_videos", "audio_vae": "{workdir}/audio"}
    latents = {
        f"latents_{kind}": defaults.encode(
            f"world:{kind}:9x32x32@8:{clips}", **autoencoders, validation=_HELD_OUT
        )
        for kind, clips in _KINDS.items()
    }
    latents |= {
        f"latents_{name}": defaults.encode(f"world:single:{size}", **autoencoders)
        for name, size in _SIZES.items()
    }
    views = defaults.encode(
        "world:single:9x32x32@8:6144",
        **autoencoders,
        views=("stills", "slow", "small", "edges"),
    )
    images, videos = transformer(world_dit.get_config().stages.images), silent()
    images.data.sources = videos.data.sources[2:]
    images.data.weights = (0.6, 0.4)
    images.data.validation = f"{_LATENTS[0]}#val:1"
    images.steps = 400
    return defaults.stages(
        vae_images=vae.images,
        vae_videos=vae.videos,
        audio=world_audio.get_config(),
        **latents,
        views=views,
        images=images,
        videos=videos,
        all=everything(),
    )
