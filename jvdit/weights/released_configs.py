"""The configs of released networks: one class for each kind of `config.json`.

Its fields have our names where they mean the same as a field of the module. A setting
that our modules can't express is refused, not ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Struct, field

from jvdit.models.audio_vae import AudioVAE
from jvdit.models.backbones import MODELS, Backbone
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE

PATCH_SIZE = (1, 2, 2)
_CELLS = 4  # latent cells of a patch
# Bounds against damaged files, whose huge sizes would exhaust time or memory.
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class _DiTConfig(Struct, frozen=True, kw_only=True):
    """The fields of a DiT's config that diffusers and Wan's authors name alike."""

    depth: Depth = field(name="num_layers")
    ffn_width: Size = field(name="ffn_dim")
    freq_dim: Size
    eps: float
    control_layers: tuple[int, ...] | None = field(name="vace_layers", default=None)


class DiffusersDiT(_DiTConfig, frozen=True, kw_only=True):
    """The config of diffusers' WanTransformer3DModel and WanVACETransformer3DModel."""

    num_heads: Size = field(name="num_attention_heads")
    head_dim: Size = field(name="attention_head_dim")
    taken: Size = field(name="in_channels")
    given: Size | None = field(name="out_channels")
    text_width: Size = field(name="text_dim")
    cross_norm: bool = field(name="cross_attn_norm")
    image_dim: Size | None = None
    pos_embed_seq_len: Size | None = None
    patch_size: tuple[int, ...] = PATCH_SIZE
    norm: str = field(name="qk_norm", default="rms_norm_across_heads")
    control: Size = field(name="vace_in_channels", default=96)

    def __post_init__(self):
        _expect("patch_size", self.patch_size, PATCH_SIZE)
        _takes("in_channels", self.taken, self.given or self.taken)
        _expect("qk_norm", self.norm, "rms_norm_across_heads")


class OriginalDiT(_DiTConfig, frozen=True, kw_only=True):
    """The config of WanModel, in the original releases of Wan's authors."""

    model_type: str
    width: Size = field(name="dim")
    num_heads: Size
    taken: Size = field(name="in_dim")
    given: Size = field(name="out_dim")
    text_width: Size = field(name="text_dim", default=4096)
    control: Size = field(name="vace_in_dim", default=96)

    def __post_init__(self):
        _takes("in_dim", self.taken, self.given)


def dit_fields(
    config: DiffusersDiT | OriginalDiT, attends: bool = True
) -> dict[str, Any]:
    """The fields of `DiT` for a released config.

    Args:
        config: the contents of the file.
        attends: whether the weights include attention to an image; the original
            configs of Wan 2.1 I2V, which does, and Wan 2.2 I2V don't tell.
    """
    given = config.given or config.taken
    fields = _alike(config, MODELS["dit"].module) | {
        "in_channels": _CELLS * given,
        "out_channels": _CELLS * given,
        # An I2V network's further input channels hold the given frames and their mask.
        "cond_channels": _CELLS * (config.taken - given),
    }
    if isinstance(config, DiffusersDiT):
        fields["width"] = config.num_heads * config.head_dim
        fields["image_width"] = config.image_dim or 0
        fields["image_length"] = config.pos_embed_seq_len or 0
    else:
        picture = attends and config.model_type in ("i2v", "flf2v")
        fields["image_width"] = 1280 * picture
        fields["image_length"] = 514 * (config.model_type == "flf2v")
    if fields.pop("control_layers") is not None:
        fields["control_layers"] = config.control_layers
        fields["control_channels"] = _CELLS * config.control
    return fields


def patch_channels(module: Backbone) -> tuple[int, int] | None:
    """Input channels of a latent cell: (noisy, conditioning); None without the latter.

    `wan.dit_rules` takes them to split the patch embedding.
    """
    if not module.cond_channels:
        return None
    return module.in_channels // _CELLS, module.cond_channels // _CELLS


def conditions_of(module: Backbone, clean_frames: bool) -> tuple[str, ...]:
    """The conditions that a released network was trained with, names in `CONDITIONS`.

    Args:
        module: the network.
        clean_frames: the release takes a first frame as clean tokens
            (`expand_timesteps` in diffusers).
    """
    if module.control_channels:
        return ("control",)
    if module.cond_channels:
        if module.image_length:
            return ("both_channels",)
        return ("first_channels",) if module.image_width else ("end_channels",)
    return ("first_frame",) if clean_frames else ()


class VAEConfig(Struct, frozen=True):
    """The config of diffusers' AutoencoderKLWan."""

    encoder_width: Size = field(name="base_dim")
    latent_channels: Size = field(name="z_dim")
    multipliers: tuple[Size, ...] = field(name="dim_mult")
    num_res_blocks: Depth
    temporal_downsample: tuple[bool, ...] = field(name="temperal_downsample")
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    decoder_base_dim: Size | None = None
    patch: Size | None = field(name="patch_size", default=None)
    residual_shortcuts: bool = field(name="is_residual", default=False)
    attn_scales: tuple[float, ...] = ()

    def __post_init__(self):
        _expect("attn_scales", self.attn_scales, ())

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `VideoVAE`."""
        width = self.decoder_base_dim or self.encoder_width
        more = {"decoder_width": width, "patch_size": self.patch or 1}
        return _alike(self, VideoVAE) | more


class AudioVAEConfig(Struct, frozen=True):
    """The config of diffusers' AutoencoderKLKVAEAudio."""

    encoder_width: Size = field(name="encoder_dim")
    strides: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=16)] = (
        field(name="encoder_rates")
    )
    feature_width: Size = field(name="latent_dim")
    latent_channels: Size = field(name="codebook_dim")
    coarsest: Size = field(name="decoder_dim")
    decoder_rates: tuple[Size, ...]
    sample_rate: Size
    channels: int = field(name="num_channels")
    num_heads: Size = field(name="attn_num_heads")

    def __post_init__(self):
        _expect("decoder_rates", self.decoder_rates, self.strides[::-1])
        _expect("num_channels", self.channels, 1, 2)
        _divides("decoder_dim", self.coarsest, 2 ** len(self.strides))
        _divides("latent_dim", self.feature_width, self.num_heads)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `AudioVAE`."""
        width = self.coarsest // 2 ** len(self.strides)
        return _alike(self, AudioVAE) | {"decoder_width": width}


class TextConfig(Struct, frozen=True):
    """The config of transformers' UMT5 or T5 v1.1."""

    kind: str = field(name="model_type")
    activation: str = field(name="feed_forward_proj")
    vocab_size: Size
    width: Size = field(name="d_model")
    depth: Depth = field(name="num_layers")
    num_heads: Size
    head_dim: Size = field(name="d_kv")
    ffn_width: Size = field(name="d_ff")
    num_buckets: Size = field(name="relative_attention_num_buckets")
    max_distance: Size = field(name="relative_attention_max_distance")
    eps: float = field(name="layer_norm_epsilon")

    def __post_init__(self):
        _expect("model_type", self.kind, "umt5", "t5")
        _expect("feed_forward_proj", self.activation, "gated-gelu", "gated_gelu_new")

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `TextEncoder`."""
        return _alike(self, TextEncoder) | {"shared_bias": self.kind == "t5"}


class _Vision(Struct, frozen=True):
    """The vision part of a CLIP config, with transformers' defaults."""

    width: Size = field(name="hidden_size", default=768)
    layers: Depth = field(name="num_hidden_layers", default=12)
    num_heads: Size = field(name="num_attention_heads", default=12)
    ffn_width: Size = field(name="intermediate_size", default=3072)
    patch_size: Size = 32
    image_size: Size = 224
    activation: str = field(name="hidden_act", default="quick_gelu")
    eps: float = field(name="layer_norm_eps", default=1e-5)
    num_channels: int = 3

    def __post_init__(self):
        _expect("num_channels", self.num_channels, 3)


class ImageConfig(_Vision, frozen=True, kw_only=True):
    """The config of transformers' CLIP, or of its vision model alone."""

    kind: str = field(name="model_type")
    vision: _Vision | None = field(name="vision_config", default=None)

    def __post_init__(self):
        super().__post_init__()
        _expect("model_type", self.kind, "clip_vision_model", "clip")
        if (self.kind == "clip") != (self.vision is not None):
            raise ValueError("`vision_config` belongs to a `model_type` of 'clip'")

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `ImageEncoder`.

        Its depth is one less than the config's, since Wan uses the states before the
        last layer.
        """
        vision = self.vision or self
        return _alike(vision, ImageEncoder) | {"depth": vision.layers - 1}


def _alike(config: Struct, module: type) -> dict[str, Any]:
    """The fields of a config that a module has under the same name."""
    known: Mapping[str, Any] = module.__dataclass_fields__
    values = msgspec.structs.asdict(config).items()
    return {name: value for name, value in values if name in known}


def _expect(name: str, found: Any, *wanted: Any) -> None:
    if found not in wanted:
        wants = " or ".join(map(repr, wanted))
        raise ValueError(f"`{name}` (={found!r}) must be {wants}")


def _takes(name: str, taken: int, given: int) -> None:
    """Checks that a network takes noisy latents, perhaps with given ones and a mask."""
    if taken not in (given, 2 * given + 4):
        raise ValueError(
            f"`{name}` (={taken}) must be {given}, or {2 * given + 4} with given "
            "frames and their mask; networks of Wan Fun, which take more, aren't read"
        )


def _divides(name: str, found: int, parts: int) -> None:
    if found % parts:
        raise ValueError(f"`{name}` (={found}) must be a multiple of {parts}")
