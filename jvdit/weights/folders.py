"""Loads the networks of a released model from its folder: modules and parameters.

A folder is a pipeline in diffusers' layout (`transformer/`, `vae/`, `text_encoder/`, …,
each with its `config.json`, see `released_configs`), or one of those parts. Safetensors
files of the original Wan release work too.
"""

import os
import pathlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jvdit.machine.json_files import read_json
from jvdit.models import audio_vae, image_encoder, text_encoder, video_vae
from jvdit.models.audio_vae import AudioVAE
from jvdit.models.backbones import MODELS, Backbone
from jvdit.models.image_encoder import ImageEncoder
from jvdit.models.text_encoder import TextEncoder
from jvdit.models.video_vae import VideoVAE
from jvdit.sharding import parameter_shardings
from jvdit.weights import clip, kvae, umt5, wan, wan_vae
from jvdit.weights import released_configs as configs
from jvdit.weights.adapters import part_of
from jvdit.weights.families import READ, family_of
from jvdit.weights.parameters import Network
from jvdit.weights.rules import LAYOUTS, Rule, export, loader
from jvdit.weights.tensors import PathLike, TensorFiles, write_tensors

# Tensors that only the original release has, to tell the two layouts apart.
_DIT, _VAE = "head.head.weight", "conv1.weight"
_TEXT, _IMAGE = "norm.weight", "visual.cls_embedding"
_AUDIO = "in_proj.weight_g"
_REMEDY = "download it again, or give the folder of this part of one of Wan's releases"
_AGAIN = "download it again, or give the folder of KVAE-Audio's autoencoder"
_ATTENDS = "img_emb.proj.0.weight"


def load_dit(
    folder: PathLike,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    variant: str = "",
    like: PathLike | None = None,
    **fields: Any,
) -> Network:
    """Opens the DiT of a Wan release; its parameters are read when first needed.

    Args:
        folder: the pipeline, or one network in it, such as `transformer_2` of Wan 2.2
            A14B; or a single file, such as ComfyUI's, if `like` is given.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.
        variant: version of the weights, see `TensorFiles`.
        like: folder of a network of the same sizes, whose config a single file takes.
        **fields: fields of `DiT` that the release doesn't set, such as `scan_layers`.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "transformer")
    config = None if file is None else _dit_config(file)
    tensors = TensorFiles(folder, variant)
    if family := family_of(tensors):
        raise ValueError(f"{folder} is a network of {family}; read are {READ}.")
    if config is None:
        where = _part(folder if like is None else like, "transformer")[1]
        if where is None:
            raise ValueError(lone(folder))
        config = _dit_config(where)
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        tensors.within(prefix)
    sizes = configs.dit_fields(config, _ATTENDS in tensors) | fields
    module = MODELS["dit"].module(**sizes, dtype=dtype, param_dtype=dtype)
    rules = partial(wan.dit_rules, channels=configs.patch_channels(module))
    return _load(_DIT, module, module.example_inputs(), tensors, rules, mesh)


def lone(file: PathLike) -> str:
    """The message that refuses weights without a release, and says what would work."""
    tensors = TensorFiles(file)
    if tensors and all(part_of(name) for name in tensors):
        return f"{file} holds adapters; give their model, and this file with --lora."
    if family := family_of(tensors):
        return f"{file} is a network of {family}; read are {READ}, in folders."
    return (
        f"{file} holds weights alone. If they are a network of Wan, give them with "
        "--dit (from Python: parts={'dit': FILE}) beside the folder of its release, "
        "which holds the text encoder, the autoencoder and the tokenizer."
    )


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
    original = file is None or isinstance(_dit_config(file), configs.OriginalDiT)
    layout = "original" if original else "diffusers"
    tensors = export(wan.dit_rules(layout, configs.patch_channels(module)), params)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    shutil.copy(source / "config.json", folder / "config.json")


def load_vae(folder: PathLike, mesh: Mesh | None = None, variant: str = "") -> Network:
    """Opens the autoencoder of a Wan release; its parameters are read when needed.

    Args:
        folder: the pipeline, its `vae` folder, or the original release's file converted
            to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        variant: version of the weights, see `TensorFiles`.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "vae")
    tensors = TensorFiles(folder, variant)
    if file is None:
        larger = _VAE in tensors and len(tensors[_VAE]) == 96
        sizes = video_vae.VARIANTS["wan2.2" if larger else "wan2.1"]
    else:
        sizes = read_json(file, _REMEDY, configs.VAEConfig).fields
    module = VideoVAE(**sizes)
    side = module.spatial_compression
    video = jnp.zeros((1, 1, side, side, 3))
    rules = partial(wan_vae.rules, module)
    return _load(_VAE, module, (video,), tensors, rules, mesh)


def load_audio_vae(folder: PathLike) -> Network:
    """Opens KVAE-Audio's autoencoder; its parameters are read when first needed.

    Args:
        folder: the folder that diffusers saves, a pipeline with it in `audio_vae`, or
            the safetensors file of the released sizes.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "audio_vae")
    sizes = audio_vae.VARIANTS["kvae-audio"]
    if file is not None:
        sizes = read_json(file, _AGAIN, configs.AudioVAEConfig).fields
    module = AudioVAE(**sizes)
    sound = jnp.zeros((1, module.hop, module.channels))
    rules = partial(kvae.rules, module)
    return _load(_AUDIO, module, (sound,), TensorFiles(folder), rules)


def load_text_encoder(
    folder: PathLike,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    variant: str = "",
) -> Network:
    """Opens the text encoder of a Wan release (UMT5), or a T5 v1.1.

    Its parameters are read when first needed.

    Args:
        folder: the pipeline, its `text_encoder` folder, or the original release's file
            converted to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        dtype: dtype of the parameters and of the computation.
        variant: version of the weights, see `TensorFiles`.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "text_encoder")
    sizes = text_encoder.VARIANTS["umt5-xxl"]
    if file is not None:
        sizes = read_json(file, _REMEDY, configs.TextConfig).fields
    module = TextEncoder(**sizes, dtype=dtype, param_dtype=dtype)
    blank = jnp.zeros((1, 1), jnp.int32)
    rules = partial(umt5.rules, shared_bias=module.shared_bias)
    tensors = TensorFiles(folder, variant)
    return _load(_TEXT, module, (blank, blank), tensors, rules, mesh)


def load_image_encoder(
    folder: PathLike, mesh: Mesh | None = None, variant: str = ""
) -> Network:
    """Opens the image encoder of a Wan 2.1 I2V release (CLIP).

    It ends before the release's last layer, since Wan uses the states there. Its
    parameters are read when first needed.

    Args:
        folder: the pipeline, its `image_encoder` folder, or the original release's file
            converted to safetensors.
        mesh: device mesh to shard the parameters over; None: all on the default device.
        variant: version of the weights, see `TensorFiles`.

    Raises:
        FileNotFoundError: a file is missing; says which.
        ValueError: the folder holds another network, or damaged files.
    """
    folder, file = _part(folder, "image_encoder")
    sizes = image_encoder.VARIANTS["clip-vit-h-14"]
    if file is not None:
        sizes = read_json(file, _REMEDY, configs.ImageConfig).fields
    module = ImageEncoder(**sizes)
    images = jnp.zeros((1, module.image_size, module.image_size, 3))
    tensors, rules = TensorFiles(folder, variant), partial(clip.rules, module)
    return _load(_IMAGE, module, (images,), tensors, rules, mesh)


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


def _dit_config(file: pathlib.Path) -> configs.DiffusersDiT | configs.OriginalDiT:
    held = read_json(file, _REMEDY, dict[str, Any])
    if "num_attention_heads" in held:
        return read_json(file, _REMEDY, configs.DiffusersDiT)
    if "dim" in held:
        return read_json(file, _REMEDY, configs.OriginalDiT)
    kind = held.get("_class_name", "unknown")
    raise ValueError(
        f"{file}: a network of class {kind} is not one of Wan's; known are "
        "WanTransformer3DModel, WanVACETransformer3DModel and WanModel."
    )


def _load(
    original: str,
    module: Any,
    inputs: tuple[Any, ...],
    tensors: TensorFiles,
    rules: Callable[..., list[Rule]],
    mesh: Mesh | None = None,
) -> Network:
    table, dtype = rules(layout=LAYOUTS[original in tensors]), module.param_dtype
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    places = None if mesh is None else parameter_shardings(shapes, mesh)
    bring = loader(table, tensors, shapes, places, dtype, os.fspath(tensors.path))
    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return Network(module, bring, held)
