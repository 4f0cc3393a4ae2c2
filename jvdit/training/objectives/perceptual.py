"""Features of frames, in which the perceptual term compares pictures."""

import collections
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from jvdit.models.convolution import conv2d
from jvdit.models.dense import along_last
from jvdit.weights.tensors import PathLike, TensorFiles

_NAME = re.compile(r"scale_(\d+)\.conv_(\d+)\.(kernel|bias)|input\.(scale|bias)")


def random_features(
    frames: Float[Array, "n H W 3"], channels: tuple[int, ...] = (16, 32, 64)
) -> list[Float[Array, "n h w c"]]:
    """Features of a fixed, random convolutional network at several scales.

    Random filters already tell blur and ringing from sharp edges (arXiv:1801.03924
    finds random networks better than pixel distances), need no download, and are the
    same everywhere, because their seed is a constant.

    Args:
        frames: images with pixels in [-1, 1].
        channels: width of each scale; every scale but the first halves the resolution.
    """
    features, x = [], frames
    for i, width in enumerate(channels):
        key = jax.random.fold_in(jax.random.key(20_221), i)
        kernel = jax.random.normal(key, (3, 3, x.shape[-1], width))
        kernel = kernel - kernel.mean((0, 1), keepdims=True) * 0.5
        kernel = kernel / jnp.sqrt(9 * x.shape[-1])
        strides = (1, 1) if i == 0 else (2, 2)
        form = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), strides, "SAME", dimension_numbers=form
        )
        x = jax.nn.leaky_relu(x, 0.2) * 1.4
        features.append(x)
    return features


def given_features(
    params: Any, frames: Float[Array, "n H W 3"]
) -> list[Float[Array, "n h w c"]]:
    """Features of a user's own network, from `read_features`: the last of each scale.

    Those of each position are divided by their root mean square (arXiv:1801.03924,
    section 3), so that networks of any size weigh about the same.

    Args:
        params: of the network.
        frames: images with pixels in [-1, 1].

    Raises:
        ValueError: the frames are too small for the network's last scale.
    """
    scales = sum(name.startswith("scale_") for name in params)
    if min(frames.shape[1:3]) < (least := 2 ** (scales - 1)):
        raise ValueError(
            f"frames of {frames.shape[1]} x {frames.shape[2]} pixels are too small for "
            f"`loss.features`, whose {scales} scales need {least}; leave out its "
            f"coarsest scales, or train on larger clips."
        )
    features, x = [], frames
    if "input" in params:
        x = x * along_last(params["input"]["scale"], x)
        x = x + along_last(params["input"]["bias"], x)
    for i in range(scales):
        x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
        for j in range(len(layers := params[f"scale_{i}"])):
            x = nn.relu(conv2d(x, **layers[f"conv_{j}"]))
        square = jnp.square(x).mean(-1, keepdims=True)
        features.append(x * jax.lax.rsqrt(square + 1e-6))
    return features


def read_features(folder: PathLike) -> dict[str, Any]:
    """Reads a user's own perceptual network from a folder of safetensors.

    It is a stack of 3 x 3 convolutions, each with a ReLU behind it, and with 2 x 2
    max-pooling between one scale and the next, as in VGG (arXiv:1409.1556). Tensors:

    - `scale_S.conv_C.kernel` [3 3 i o] and `.bias` [o], S and C counting from 0. A
      kernel of PyTorch, [o i 3 3], becomes one by `permute(2, 3, 1, 0)`.
    - `input.scale` [3] and `input.bias` [3], both or neither: what pixels in [-1, 1]
      are multiplied by, and what is added then. Where a network was trained on pixels
      in [0, 1] less `mean`, over `std`: 0.5 / std and (0.5 - mean) / std.

    Returns:
        Its parameters in float32, for `given_features`.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no safetensors.
        ValueError: tensors are missing, unknown, of another shape, or not finite.
    """
    tensors = TensorFiles(folder)
    for name, value in tensors.items():
        if not _NAME.fullmatch(name):
            _refuse(folder, f"holds `{name}`", "name it as `scale_0.conv_0.kernel`")
        if not np.isfinite(value.astype(np.float32)).all():
            _refuse(folder, f"has `{name}` with numbers that aren't", "be finite")
    for name, asked in _layout(folder, tensors).items():
        held = tensors[name].shape if name in tensors else None
        if held != asked:
            told = f"lacks `{name}`" if held is None else f"has `{name}` of {held}"
            _refuse(folder, told, f"have it, of shape {asked}")
    flat = {name: value.astype(np.float32) for name, value in tensors.items()}
    return unflatten_dict(flat, sep=".")


def _layout(folder: PathLike, tensors: TensorFiles) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a perceptual network must have, by name."""
    matches = [_NAME.fullmatch(name) for name in tensors]
    layers = sorted({(int(m[1]), int(m[2])) for m in matches if m and m[1]})
    counts = collections.Counter(scale for scale, _ in layers)
    counted = [(s, c) for s in range(len(counts)) for c in range(counts[s])]
    if not layers or layers != counted:
        told = ", ".join(f"scale_{s}.conv_{c}" for s, c in layers) or "no layers"
        _refuse(folder, f"holds {told}", "count scales and layers from 0 without gaps")
    wanted: dict[str, tuple[int, ...]] = {}
    channels = 3
    for scale, conv in layers:
        name = f"scale_{scale}.conv_{conv}"
        features = tensors.get(f"{name}.kernel", np.zeros(0)).shape[-1]
        wanted |= {f"{name}.kernel": (3, 3, channels, features)}
        wanted |= {f"{name}.bias": (features,)}
        channels = features
    if any(name.startswith("input.") for name in tensors):
        wanted |= {"input.scale": (3,), "input.bias": (3,)}
    return wanted


def _refuse(folder: PathLike, told: str, rule: str) -> None:
    raise ValueError(
        f"`loss.features` (={folder}) {told}, and must {rule}; the layout is in "
        "jvdit.training.objectives.perceptual.read_features."
    )
