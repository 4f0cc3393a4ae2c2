"""Default settings of every kind of run; `configs/` change what an experiment needs.

Every value can be changed on the command line, `--config.optim.lr=3e-4`; a name that
isn't here is refused with the nearest one that is.
"""

import dataclasses
from typing import Any, TypeAlias

import jax.numpy as jnp
from ml_collections import ConfigDict

from jvdit.data.conditions import CONDITIONS
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models import audio_vae as audio_vae_module
from jvdit.models import critics, text_encoder, video_vae
from jvdit.models.backbones import MODELS, family_of
from jvdit.models.lora import LoRA
from jvdit.training.optim import Optim
from jvdit.weights.recipes import POLICY, RECIPES, TEXT_LENGTH, TIMESTEPS

# A ConfigDict. Its attributes have no types that a checker could know.
Config: TypeAlias = Any

# What a training of a DiT shows of itself, and what suits its model later.
SAMPLE: dict[str, Any] = {
    "prompts": (),
    # Clips of prompts of the procedural world that the oracle scores.
    "scored": 0,
    "frames": 17,
    "height": 64,
    "width": 64,
    "fps": 8.0,
    "steps": 30,
    "solver": "unipc",
    "guidance_scale": 4.0,
    # A picture first, and then the clip that begins with it.
    "draft": False,
    # Of models with sound: the picture first, and then the sound for it; how strongly
    # sound is guided to be in step with the picture.
    "sound_after": False,
    "sound_sync_scale": 1.0,
    # Folder of a model that draws those pictures. "": the model itself.
    "pictures": "",
}


def fields_of(module: type, values: dict[str, Any], *decided: str) -> Config:
    """All fields of a Linen module as settings.

    Args:
        module: the class.
        values: a row of its table of sizes.
        decided: fields left out, because other parts of the system decide them.
    """
    fields = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name", *decided):
            continue
        value = values.get(field.name, field.default)
        if field.name.endswith("dtype"):
            value = jnp.dtype(value).name
        fields[field.name] = tuple(value) if isinstance(value, list) else value
    return ConfigDict(fields)


def run(objective: str) -> Config:
    """What every training has."""
    config: Config = ConfigDict()
    config.objective = objective
    config.seed = 0
    config.steps = 10_000
    # Folder of finished weights, the `model` of another run, to begin with. "": fresh.
    config.start_from = ""
    # Devices along each mesh axis; -1: those that remain.
    config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}
    # Of float32 products: "default" (the backend's own), "bfloat16" or "float32".
    config.matmul_precision = "default"
    # Options of XLA beside those of the chip, "xla_…=VALUE" each.
    config.compiler_options = ()
    config.optim = dataclasses.asdict(Optim())
    # Steps from one to the next; 0: only at the end.
    config.checkpoint_every = 500
    config.log_every = 20
    config.evaluate_every = 1000
    config.sample_every = 2000
    config.keep_checkpoints = 3
    # Where scalars and sheets are logged: "tensorboard" or "wandb".
    config.logger = "tensorboard"
    # Steps of which a profiler trace is recorded, such as "10:13". "": none.
    config.profile_steps = ""
    # Steps in a row with a loss or gradient that isn't finite after which to stop.
    config.max_skipped = 20
    config.data = {
        # What to train on, each a source as `jvdit.data.sources.open_source` reads it.
        "sources": ("",),
        # Share of the clips from each source; (): as many as each has.
        "weights": (),
        # Held out: the same kinds of source. "": no validation.
        "validation": "",
        "validation_clips": 64,
        # Batches are made by so many threads, or processes with so many threads each:
        # a GPU that takes thousands of small clips a second needs several of those.
        "threads": 2,
        "workers": 0,
        # Seconds after which a batch that doesn't come is reported as stuck.
        "timeout": 600.0,
        # Share of clips that may be unreadable before the run stops.
        "max_bad": 0.1,
        # Bound of the batches that wait to be trained on.
        "prefetch_bytes": 1 << 28,
    }
    return config


def critic(module: type) -> Config:
    """A critic for an autoencoder, off until it has a `start`; see `Critic`.

    Args:
        module: the class of its network.
    """
    return ConfigDict(
        {
            # Step from which it is trained and heeded, 1: the first. 0: there is none.
            "start": 0,
            "weight": 0.5,
            "matching": 1.0,
            "network": fields_of(module, {}),
            # Its entry in `optim.networks`. Moments with short memories follow a loss
            # that moves, and soon forget the zeros from before the start, which would
            # make the first updates large.
            "optim": {
                "name": "adamw",
                "lr": 3e-4,
                "schedule": "constant",
                "warmup": 0,
                "b1": 0.5,
                "b2": 0.9,
                "weight_decay": 0.0,
            },
        }
    )


def vae(variant: str = "world") -> Config:
    """Training a video autoencoder of a row of `video_vae.VARIANTS`."""
    config = run("video_vae")
    config.vae = fields_of(
        video_vae.VideoVAE, video_vae.VARIANTS[variant], "latents_mean", "latents_std"
    )
    loss = {"mse": 5.0, "perceptual": 0.5, "kl": 3e-4, "temporal": 0.5}
    # Folder of a network of one's own whose features the perceptual term compares, as
    # `jvdit.training.objectives.perceptual.read_features` reads it. "": random ones.
    config.loss = {**loss, "features": ""}
    config.critic = critic(critics.PictureCritic)
    # Pixels of a batch, frames x height x width over its clips: a batch holds clips of
    # one size, many if they are small.
    config.data.pixel_budget = 8 * 17 * 64 * 64
    return config


def audio_vae(variant: str = "world") -> Config:
    """Training an audio autoencoder of a row of `audio_vae.VARIANTS`."""
    config = run("audio_vae")
    module, values = audio_vae_module.AudioVAE, audio_vae_module.VARIANTS[variant]
    config.vae = fields_of(module, values, "latents_mean", "latents_std")
    config.loss = {"l1": 20.0, "spectrum": 20.0, "kl": 1e-3}
    config.critic = critic(critics.SoundCritic)
    # Samples of a batch, over all of its sounds.
    config.data.sample_budget = 16 * 18_000
    return config


def flow(variant: str = "world-s", text_variant: str = "world") -> Config:
    """Training a DiT on cached latents.

    Args:
        variant: a size of `MODELS`, such as those of `dit.VARIANTS`.
        text_variant: a row of `text_encoder.VARIANTS` to train along with it. "": take
            the text embeddings that the cache holds.
    """
    config = run("flow")
    # Folder of an autoencoder whose latents the cache must hold. "": whichever
    # autoencoder wrote the cache.
    config.autoencoder = ""
    # "both" trains two experts, one for times above the boundary, "dit", and one below,
    # "dit_low"; of a released `start_from` either can be trained alone.
    config.expert = "dit"
    config.boundary = 0.0
    # Of `MODELS`; its fields are those of `dit`, whichever it is.
    config.backbone = family_of(variant)
    module, variants = MODELS[config.backbone]
    decided = ("in_channels", "out_channels", "text_width", "sound_channels")
    config.dit = fields_of(module, variants[variant], *decided)
    # Share of the clips of which each condition is given, so that the model takes it:
    # with `first_frame` a request's `image`.
    config.given = {name: 0.0 for name, row in CONDITIONS.items() if row.trains}
    # Noise that given tokens have in training, though the network is told that they are
    # clean: so that a film bears with what it made itself. 0: none.
    config.given_noise = 0.0
    # Share of the clips whose chunks (`dit.chunk_frames`) have noise levels of their
    # own, so that a causal model can stream, and of these the share that begins clean.
    config.forcing = {"share": 0.0, "clean": 0.5}
    # Of clips with sound (`data.sound_budget`): shares of what is learned of them, the
    # rows of `pairings.PAIRINGS`; share in which picture and sound don't see one
    # another, for guidance towards what is in step; weight of the sound's error.
    config.pairings = {
        "together": 0.4,
        "apart": 0.25,
        "picture_to_sound": 0.15,
        "sound_to_picture": 0.1,
        "picture": 0.05,
        "sound": 0.05,
    }
    config.cut = 0.15
    config.sound_weight = 1.0
    # Adapters to train in the place of the weights of `start_from`; rank 0: none.
    config.lora = dataclasses.asdict(LoRA()) | {"rank": 0}
    config.text_encoder = ConfigDict()
    if text_variant:
        config.text_encoder = fields_of(
            text_encoder.TextEncoder, text_encoder.VARIANTS[text_variant], "vocab_size"
        )
    # A sentencepiece model; "": one of this many pieces is trained on the captions.
    config.tokenizer = ""
    config.vocab_size = 512
    config.patch_size = (1, 2, 2)
    # What the network takes its inputs to mean, see `Bundle`.
    config.conventions = {"seconds": True, "pad_text": False}
    config.path = dataclasses.asdict(NoisePath())
    config.timesteps = dataclasses.asdict(TimestepPolicy())
    config.data.update(
        # Rows of a batch, and what a row holds at the most.
        rows=16,
        token_budget=1024,
        text_budget=256,
        # Tokens of sounds of a row; 0: clips are silent.
        sound_budget=0,
        max_clips=4,
        # Tokens of a caption at the most.
        text_length=64,
        caption_dropout=0.1,
    )
    config.validation_times = (0.1, 0.3, 0.5, 0.7, 0.9)
    config.sample = SAMPLE
    return config


def wan(variant: str, release: str) -> Config:
    """Finetuning a released Wan 2 model, on latents and text states of its own.

    Args:
        variant: its row of `dit.VARIANTS` and `RECIPES`.
        release: its folder.

    Raises:
        ValueError: the model takes pictures, for which there is no training yet.
    """
    row = MODELS["dit"].variants[variant]
    if any(name in row for name in ("cond_channels", "control_channels")):
        known = "wan2.1-t2v-1.3b, wan2.1-t2v-14b, wan2.2-t2v-a14b, wan2.2-ti2v-5b"
        raise ValueError(f"{variant} takes pictures; those that train are {known}.")
    config, recipe = flow(variant, text_variant=""), RECIPES[variant]
    config.start_from = release
    config.conventions.update(seconds=False, pad_text=True)
    config.path.timesteps = TIMESTEPS
    config.timesteps.update(shift=recipe["shift"], **POLICY)
    config.dit.update(dtype="bfloat16", scan_layers=True, remat="full")
    config.data.update(
        rows=8, max_clips=1, text_length=TEXT_LENGTH, text_budget=TEXT_LENGTH
    )
    names = ("frames", "height", "width", "fps", "steps", "solver", "guidance_scale")
    config.sample.update({name: recipe[name] for name in names})
    config.optim.update(lr=1e-5, schedule="constant", warmup=100)
    return config


def encode(
    source: str,
    vae: str,
    validation: str = "",
    text_encoder: str = "",
    text_length: int = 64,
    audio_vae: str = "",
    views: tuple[str, ...] = (),
) -> Config:
    """Encoding a source to latents, as a stage of a config of several.

    Args:
        source: what to encode.
        vae: folder of the autoencoder.
        validation: what to encode as the split val. "": nothing.
        text_encoder: folder of the text encoder for the captions. "": none.
        text_length: tokens of a caption at the most.
        audio_vae: folder of the audio autoencoder. "": clips become silent.
        views: what to encode beside the clips for `given`, names of `VIEWS`.
    """
    return ConfigDict({"objective": "encode", **locals()})


def stages(**configs: Config) -> Config:
    """Several runs one after another, each in its own folder of the workdir."""
    return ConfigDict({"stages": configs, "order": tuple(configs)})
