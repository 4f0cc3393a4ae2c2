"""The whole way at sizes that train in seconds; `test_train.py` runs it."""

from jvdit import config as defaults


def intervals(config, steps):
    """Makes a run short, looking at itself on the way."""
    config.steps = steps
    config.log_every = 2
    config.evaluate_every = config.sample_every = steps
    config.checkpoint_every = max(steps // 4, 1)
    config.optim.warmup = 2
    return config


def get_config():
    """Three stages on 5 x 16 x 16 and 9 x 16 x 16 clips of the world."""
    vae = intervals(defaults.vae("tiny"), 4)
    vae.vae.middle_attention = False
    vae.data.sources = ("world:train:5x16x16@8:1000",)
    vae.data.validation = "world:val:5x16x16@8:2"
    vae.data.pixel_budget = 8 * 5 * 16 * 16
    latents = defaults.encode(
        "world:train:5x16x16@8:64", "{workdir}/vae", "world:val:5x16x16@8:8"
    )
    dit = intervals(defaults.flow("tiny", "tiny"), 8)
    dit.dit.depth = dit.text_encoder.depth = 1
    dit.data.sources = ("{workdir}/latents",)
    dit.data.validation = "{workdir}/latents#val"
    dit.data.validation_clips = 8
    dit.data.rows = 8
    dit.data.token_budget = 8
    dit.data.text_budget = 128
    dit.data.max_clips = 2
    dit.patch_size = (1, 1, 2)
    dit.given.first_frame = 0.5
    dit.sample.prompts = ("one object: a red circle", "two objects")
    dit.sample.scored = 2
    dit.sample.steps = 2
    dit.sample.frames = 5
    dit.sample.height = dit.sample.width = 16
    return defaults.stages(vae=vae, latents=latents, dit=dit)


def flow_config(workdir):
    """The last stage alone, in another folder than that of `workdir`'s stages."""
    config = get_config().stages.dit.copy_and_resolve_references()
    config.data.sources = (f"{workdir}/latents",)
    config.data.validation = f"{workdir}/latents#val"
    return config
