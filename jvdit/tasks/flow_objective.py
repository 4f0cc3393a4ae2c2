"""Builds the denoising objective of a config whose `objective` is "flow"."""

from typing import Any

from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.diffusion.noise_path import NoisePath, TimestepPolicy
from jvdit.models.backbones import MODELS, Backbone
from jvdit.models.lora import LoRA
from jvdit.models.text_encoder import TextEncoder
from jvdit.training.objectives.denoising import FlowObjective
from jvdit.training.objectives.forcing import Forcing
from jvdit.training.objectives.pairings import check_pairings
from jvdit.weights.parameters import build


def flow_objective(
    config: Config,
    mesh: Mesh,
    *,
    channels: int,
    text_width: int,
    vocab_size: int,
    one_clip: bool,
    sound_channels: int = 0,
    frames: int = 0,
    longest: int = 1,
    cond_channels: int = 0,
) -> FlowObjective:
    """Builds the denoising objective from a config and the sizes that the data set.

    Args:
        config: from `jvdit.config.flow` or `wan`.
        mesh: the device mesh, over which the rows of a batch are divided.
        channels: channels of a token: latent channels times the cells of a patch.
        text_width: width of the cached text states; 0: a text encoder is trained along.
        vocab_size: vocabulary of the trained text encoder's tokenizer.
        one_clip: every row is exactly one clip without padding, so no mask is needed.
        sound_channels: channels of a token of sound; 0: clips are silent.
        frames: of every row, if it is one grid, see `Tokens`.
        longest: frames of the longest clip, in tokens.
        cond_channels: channels of a token beside the noise, for what training gives by
            them; 0: nothing.

    Raises:
        ValueError: settings contradict one another.
    """
    text_encoder = None
    if not text_width:
        fields = config.text_encoder.to_dict() | {"vocab_size": vocab_size}
        text_encoder = build(TextEncoder, fields)
        text_width = text_encoder.width
    network = config.dit.to_dict() | {
        "in_channels": channels,
        "out_channels": channels,
        "text_width": text_width,
    }
    if cond_channels:
        network["cond_channels"] = cond_channels
    sound = _sound(config, mesh) if sound_channels else {}
    if sound_channels:
        network["sound_channels"] = sound_channels
    lora = config.lora.to_dict()
    dit = build(MODELS[config.backbone].module, network)
    return FlowObjective(
        lora=LoRA(**lora) if lora["rank"] else None,
        dit=dit,
        text_encoder=text_encoder,
        path=NoisePath(**config.path),
        policy=TimestepPolicy.of(config.timesteps.to_dict()),
        one_clip=one_clip,
        pad_text=config.conventions.pad_text,
        boundary=_boundary(config, mesh),
        given=tuple(given_shares(config)),
        given_noise=config.given_noise,
        frames=frames,
        forcing=_forcing(config, dit, longest),
        **sound,
    )


def _sound(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The fields of an objective of picture and sound."""
    if config.expert == "both":
        raise ValueError("two experts (`expert` 'both') can't be trained with sound.")
    kinds = config.data.token_budget, config.data.sound_budget
    ways = mesh.shape["context"]
    for name, count in zip(("token_budget", "sound_budget"), kinds, strict=True):
        if count % ways:
            raise ValueError(
                f"`data.{name}` (={count}) must be divisible by `mesh.context` "
                f"(={ways}); try {-(-count // ways) * ways}."
            )
    shares = config.pairings.to_dict()
    check_pairings(shares)
    return {
        "kinds": kinds,
        "pairings": tuple(shares.items()),
        "cut": config.cut,
        "sound_weight": config.sound_weight,
    }


def given_shares(config: Config) -> dict[str, float]:
    """The conditions that a training gives, each with the share of clips.

    Raises:
        ValueError: it isn't a share, the tokens have several frames, or clips are
            silent of which a part of the sound is to be given.
    """
    frames = config.patch_size[0]
    if (share := config.given.inpaint_sound) and not config.data.sound_budget:
        raise ValueError(
            f"`given.inpaint_sound` (={share}) needs clips with sound: set "
            "`data.sound_budget`, or leave it 0."
        )
    for name, share in config.given.items():
        if share and frames != 1:
            raise ValueError(
                f"`given.{name}` (={share}) needs tokens of one frame, and `patch_size`"
                f" (={tuple(config.patch_size)}) has {frames}."
            )
    return {name: share for name, share in config.given.items() if share}


def _forcing(config: Config, dit: Backbone, longest: int) -> Forcing:
    """How chunks of clips have noise levels of their own.

    Raises:
        ValueError: what streams must be causal, silent, and one network.
    """
    shares = config.forcing.to_dict()
    if not shares["share"]:
        return Forcing(**shares)
    if not dit.is_causal:
        raise ValueError(
            f"`forcing.share` (={shares['share']}) needs a network of which no chunk "
            "sees a later one: set `dit.patterns` to ('chunk_causal',)."
        )
    for name, value in (
        ("data.sound_budget", config.data.sound_budget),
        ("boundary", config.boundary),
    ):
        if value:
            raise ValueError(
                f"`forcing.share` (={shares['share']}) is for pictures and one "
                f"network; set `{name}` (={value}) to 0."
            )
    return Forcing(**shares, chunks=-(-longest // dit.chunk_frames))


def _boundary(config: Config, mesh: Mesh) -> float:
    """The time t between two experts that are trained together; 0 for one network."""
    if config.expert != "both":
        return 0.0
    if not 0 < config.boundary < 1 or config.lora.rank:
        raise ValueError(
            f"`expert` 'both' needs a `boundary` (={config.boundary}) inside (0, 1), "
            "and no `lora.rank`: adapt one expert after the other."
        )
    ways = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    ways *= config.optim.accumulate
    if config.data.rows % ways:
        raise ValueError(
            f"`data.rows` (={config.data.rows}) must be divisible by {ways}, so "
            f"that each expert has half; try {-(-config.data.rows // ways) * ways}."
        )
    return config.boundary
