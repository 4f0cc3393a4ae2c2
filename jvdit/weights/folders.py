"""Loads the networks of a released model from its folder: modules and parameters.

A folder is a pipeline in diffusers' layout (`transformer/`, `vae/`, `text_encoder/`, …,
each with its `config.json`), or one of those parts. Safetensors files of the original
Wan release work too. There is one class for each kind of `config.json`; its fields have
our names where they mean the same as a field of the module. A setting that our modules
can't express is refused, not ignored.
"""

import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import Mesh
from jax.typing import DTypeLike
from msgspec import Struct, field

from jvdit.machine.json_files import read_json
from jvdit.models import image_encoder, text_encoder, video_vae
from jvdit.models.backbones import MODELS, Backbone
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.sharding import parameter_shardings
from jvdit.weights import clip, umt5, wan, wan_vae
from jvdit.weights.parameters import Network
from jvdit.weights.rules import LAYOUTS, Rule, export, loader
from jvdit.weights.tensors import PathLike, TensorFiles, write_tensors

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


# Tensors that only the original release has, to tell the two layouts apart.
_DIT, _VAE = "head.head.weight", "conv1.weight"
_TEXT, _IMAGE = "norm.weight", "visual.cls_embedding"
_REMEDY = "download it again, or give the folder of this part of one of Wan's releases"
_ATTENDS = "img_emb.proj.0.weight"


def load_dit(
    folder: PathLike,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    **fields: Any,
) -> Network:
    """Opens the DiT of a Wan release; its parameters are read when first needed.

    Args:
        folder: the pipeline, or one network in it, such as `transformer_2` of Wan 2.2
            A14B.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.
        **fields: fields of `DiT` that the release doesn't set, such as `scan_layers`.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "transformer")
    if file is None:
        raise ValueError(f"{folder} is a file; give the folder with its config.json.")
    config, attends = _dit_config(file), _ATTENDS in TensorFiles(folder)
    sizes = dit_fields(config, attends)
    module = MODELS["dit"].module(**sizes, **_types(dtype), **fields)
    rules = partial(wan.dit_rules, channels=patch_channels(module))
    return _load(_DIT, module, module.example_inputs(), folder, rules, mesh, dtype)


def save_dit(folder: PathLike, params: Any, module: Backbone, like: PathLike) -> None:
    """Writes a finetuned DiT in the layout of the release that it started from.

    Args:
        folder: where to write weights and `config.json`.
        params: parameters of the network, written in their own dtypes.
        module: the network.
        like: folder of the released network, whose `config.json` is copied.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, file = _part(like, "transformer")
    original = file is None or isinstance(_dit_config(file), OriginalDiT)
    layout = "original" if original else "diffusers"
    tensors = export(wan.dit_rules(layout, patch_channels(module)), params)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    shutil.copy(source / "config.json", folder / "config.json")


def load_vae(
    folder: PathLike, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
) -> Network:
    """Opens the autoencoder of a Wan release; its parameters are read when needed.

    Args:
        folder: the pipeline, its `vae` folder, or the original release's file converted
            to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "vae")
    if file is None:
        moments = TensorFiles(folder).shapes.get(_VAE, (0,))[0]
        sizes = video_vae.VARIANTS["wan2.2" if moments == 96 else "wan2.1"]
    else:
        sizes = read_json(file, _REMEDY, VAEConfig).fields
    module = VideoVAE(**sizes, **_types(dtype))
    side = module.spatial_compression
    video = jnp.zeros((1, 1, side, side, 3))
    rules = partial(wan_vae.rules, module)
    return _load(_VAE, module, (video,), folder, rules, mesh, dtype)


def load_text_encoder(
    folder: PathLike,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    **fields: Any,
) -> Network:
    """Opens the text encoder of a Wan release (UMT5), or a T5 v1.1.

    Its parameters are read when first needed.

    Args:
        folder: the pipeline, its `text_encoder` folder, or the original release's file
            converted to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.
        **fields: fields of `TextEncoder` that the release doesn't set.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "text_encoder")
    sizes = text_encoder.VARIANTS["umt5-xxl"]
    if file is not None:
        sizes = read_json(file, _REMEDY, TextConfig).fields
    module = TextEncoder(**sizes, **_types(dtype), **fields)
    blank = jnp.zeros((1, 1), jnp.int32)
    rules = partial(umt5.rules, shared_bias=module.shared_bias)
    return _load(_TEXT, module, (blank, blank), folder, rules, mesh, dtype)


def load_image_encoder(
    folder: PathLike, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
) -> Network:
    """Opens the image encoder of a Wan 2.1 I2V release (CLIP).

    It ends before the release's last layer, since Wan uses the states there. Its
    parameters are read when first needed.

    Args:
        folder: the pipeline, its `image_encoder` folder, or the original release's file
            converted to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "image_encoder")
    sizes = image_encoder.VARIANTS["clip-vit-h-14"]
    if file is not None:
        sizes = read_json(file, _REMEDY, ImageConfig).fields
    module = ImageEncoder(**sizes, **_types(dtype))
    images = jnp.zeros((1, module.image_size, module.image_size, 3))
    rules = partial(clip.rules, module)
    return _load(_IMAGE, module, (images,), folder, rules, mesh, dtype)


def _part(folder: PathLike, name: str) -> tuple[pathlib.Path, pathlib.Path | None]:
    """The folder of one network and its `config.json`; None for a single file."""
    path = pathlib.Path(folder)
    if path.is_file():
        return path, None
    if not path.is_dir():
        raise FileNotFoundError(f"{path} doesn't exist; give the folder of a release.")
    path = path / name if (path / name).is_dir() else path
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{path} has no config.json; give a folder as diffusers saves it, "
            f"with `{name}/`, or that of one network."
        )
    return path, file


def _dit_config(file: pathlib.Path) -> DiffusersDiT | OriginalDiT:
    held = read_json(file, _REMEDY, dict[str, Any])
    if "num_attention_heads" in held:
        return read_json(file, _REMEDY, DiffusersDiT)
    if "dim" in held:
        return read_json(file, _REMEDY, OriginalDiT)
    kind = held.get("_class_name", "unknown")
    raise ValueError(
        f"{file}: a network of class {kind} is not one of Wan's; known are "
        "WanTransformer3DModel, WanVACETransformer3DModel and WanModel."
    )


def _load(
    original: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    folder: pathlib.Path,
    rules: Callable[..., list[Rule]],
    mesh: Mesh | None,
    dtype: DTypeLike,
) -> Network:
    tensors = TensorFiles(folder)
    table = rules(layout=LAYOUTS[original in tensors])
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    places = None if mesh is None else parameter_shardings(shapes, mesh)
    bring = loader(table, tensors, shapes, places, dtype, os.fspath(folder))
    size = sum(x.size for x in jax.tree.leaves(shapes)) * jnp.dtype(dtype).itemsize
    return Network(module, bring, size)


def _types(dtype: DTypeLike) -> dict[str, Any]:
    return {"dtype": dtype, "param_dtype": dtype}
