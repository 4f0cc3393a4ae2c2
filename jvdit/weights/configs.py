"""Their settings to the fields of our modules: one function for each kind of network.

What a configuration says and no field of ours can express is refused, not ignored.
"""

from collections.abc import Mapping
from typing import Any

from jvdit.models.backbones import Backbone

Config = Mapping[str, Any]

PATCH_SIZE = (1, 2, 2)
_CELLS = 4  # latents of a patch
# What a nested configuration of CLIP leaves out where it is so.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def dit_fields(config: Config, attends: bool = True) -> dict[str, Any]:
    """Fields of `DiT` for a `config.json` of diffusers or of the original release.

    Args:
        config: what the file holds.
        attends: whether there are weights with which to attend to a picture: original
            files of Wan 2.1 and 2.2 I2V differ in nothing else.

    Raises:
        ValueError: the file describes a network of another family.
    """
    kind = config.get("_class_name", "")
    if "num_attention_heads" in config:
        _expect(config, "patch_size", list(PATCH_SIZE), kind)
        _expect(config, "qk_norm", "rms_norm_across_heads", kind)
        heads = config["num_attention_heads"]
        fields = {
            "width": heads * config["attention_head_dim"],
            "depth": config["num_layers"],
            "num_heads": heads,
            "ffn_width": config["ffn_dim"],
            **_channels(
                config["in_channels"], config["out_channels"] or config["in_channels"]
            ),
            "text_width": config["text_dim"],
            "freq_dim": config["freq_dim"],
            "cross_norm": config["cross_attn_norm"],
            "eps": config["eps"],
            "image_width": config.get("image_dim") or 0,
            "image_length": config.get("pos_embed_seq_len") or 0,
        }
    elif "dim" in config and "model_type" in config:
        picture = attends and config["model_type"] in ("i2v", "flf2v")
        fields = {
            "width": config["dim"],
            "depth": config["num_layers"],
            "num_heads": config["num_heads"],
            "ffn_width": config["ffn_dim"],
            **_channels(config["in_dim"], config["out_dim"]),
            "text_width": config.get("text_dim", 4096),
            "freq_dim": config["freq_dim"],
            "eps": config["eps"],
            "image_width": 1280 * picture,
            "image_length": 514 * (config["model_type"] == "flf2v"),
        }
    else:
        raise ValueError(
            f"a network of class {kind or 'unknown'} is not one of Wan's; known are "
            "WanTransformer3DModel, WanVACETransformer3DModel and WanModel."
        )
    if "vace_layers" in config:
        fields["control_channels"] = _CELLS * config.get(
            "vace_in_channels", config.get("vace_in_dim", 96)
        )
        fields["control_layers"] = tuple(config["vace_layers"])
    return fields


def _channels(taken: int, given: int) -> dict[str, int]:
    """What an I2V network takes beyond the noise is what is known of the clip."""
    sizes = {
        "in_channels": given,
        "out_channels": given,
        "cond_channels": taken - given,
    }
    return {name: _CELLS * size for name, size in sizes.items()}


def patch_channels(module: Backbone) -> tuple[int, int] | None:
    """Latent channels of noise and of what is known, for `wan.dit_rules`."""
    if not module.cond_channels:
        return None
    return module.in_channels // _CELLS, module.cond_channels // _CELLS


def conditions_of(module: Backbone, clean_frames: bool) -> tuple[str, ...]:
    """Rows of `CONDITIONS` that a released network was trained with.

    Args:
        module: the network.
        clean_frames: what the release says of first frames (`expand_timesteps`).
    """
    if module.control_channels:
        return ("control",)
    if module.cond_channels:
        if module.image_length:
            return ("both_channels",)
        return ("first_channels",) if module.image_width else ("end_channels",)
    return ("first_frame",) if clean_frames else ()


def vae_fields(config: Config) -> dict[str, Any]:
    """Fields of `VideoVAE` for a `config.json` of diffusers' AutoencoderKLWan.

    Raises:
        ValueError: the file describes another autoencoder.
    """
    kind = config.get("_class_name", "")
    if "base_dim" not in config or "z_dim" not in config:
        raise ValueError(
            f"an autoencoder of class {kind or 'unknown'} is not Wan's; known is "
            "AutoencoderKLWan."
        )
    _expect(config, "attn_scales", [], kind)
    patch = config.get("patch_size") or 1
    return {
        "encoder_width": config["base_dim"],
        "decoder_width": config.get("decoder_base_dim") or config["base_dim"],
        "multipliers": tuple(config["dim_mult"]),
        "num_res_blocks": config["num_res_blocks"],
        "temporal_downsample": tuple(config["temperal_downsample"]),
        "latent_channels": config["z_dim"],
        "patch_size": patch,
        "residual_shortcuts": bool(config.get("is_residual", False)),
        "latents_mean": tuple(config["latents_mean"]),
        "latents_std": tuple(config["latents_std"]),
    }


def text_encoder_fields(config: Config) -> dict[str, Any]:
    """Fields of `TextEncoder` for transformers' `config.json` of UMT5 or T5 v1.1.

    Raises:
        ValueError: the file describes another encoder.
    """
    kind = config.get("model_type", "")
    if kind not in ("umt5", "t5"):
        raise ValueError(
            f"a text encoder of type {kind or 'unknown'} is neither umt5 nor t5."
        )
    if config.get("feed_forward_proj") not in ("gated-gelu", "gated_gelu_new"):
        raise ValueError(
            f"`feed_forward_proj` (={config.get('feed_forward_proj')!r}) of the text "
            "encoder must be 'gated-gelu', as of UMT5 and T5 v1.1."
        )
    return {
        "vocab_size": config["vocab_size"],
        "width": config["d_model"],
        "depth": config["num_layers"],
        "num_heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "ffn_width": config["d_ff"],
        "num_buckets": config["relative_attention_num_buckets"],
        "max_distance": config["relative_attention_max_distance"],
        "shared_bias": kind == "t5",
        "eps": config["layer_norm_epsilon"],
    }


def image_encoder_fields(config: Config) -> dict[str, Any]:
    """Fields of `ImageEncoder` for transformers' `config.json` of a CLIP.

    The encoder gets one layer less than the file says: Wan reads the states before the
    last one.

    Raises:
        ValueError: the file describes another encoder.
    """
    kind = config.get("model_type", "")
    if kind not in ("clip_vision_model", "clip"):
        raise ValueError(
            f"an image encoder of type {kind or 'unknown'} is not CLIP's; known are "
            "clip_vision_model and clip."
        )
    if kind == "clip":
        config = _CLIP_DEFAULTS | config["vision_config"]
    _expect(config, "num_channels", 3, kind)
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"] - 1,
        "num_heads": config["num_attention_heads"],
        "ffn_width": config["intermediate_size"],
        "patch_size": config["patch_size"],
        "image_size": config["image_size"],
        "activation": config["hidden_act"],
        "eps": config["layer_norm_eps"],
    }


def _expect(config: Config, name: str, value: Any, kind: str) -> None:
    found = config.get(name, value)
    if found != value:
        raise ValueError(f"`{name}` (={found!r}) of a {kind} must be {value!r}.")
