"""Kernels in few bits, with a scale for each output channel, to sample in less memory.

A layer turns such a kernel back as it multiplies (`dense.Dense`), so that no more than
one layer at a time is in the type of the computation. Norms, biases, embeddings, what
stands before and after the blocks, and what control says to them stay as they are.
"""

import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from jax.sharding import NamedSharding, Sharding

from jvdit.models.dense import SCALE
from jvdit.sharding import replicated

# The type of the values, and what the largest weight of an output channel becomes.
FORMS: Mapping[str, tuple[Any, float]] = {
    "int8": (np.int8, 127.0),
    "fp8": (ml_dtypes.float8_e4m3fn, 448.0),
}
NETWORKS = ("dit", "dit_low", "text_encoder")  # the others are small
_KERNEL = re.compile(r"(block|control)s?(_\d+)?/(?!hint/).*kernel")


def check_form(name: str) -> None:
    """Raises a ValueError unless this is a name in `FORMS`, or ""."""
    if name and name not in FORMS:
        raise ValueError(f"`quantize` (={name!r}) must be one of {', '.join(FORMS)}.")


def few_bits(params: Mapping[str, Any], form: str) -> Any:
    """Parameters with the kernels of their blocks in few bits.

    Args:
        params: of a network, layers stacked or not. Those on the host stay there, and
            those on devices where they are.
        form: a name in `FORMS`; "": as they are.
    """
    if not form:
        return params
    found: dict[str, Any] = {}
    for path, leaf in flatten_dict(dict(params), sep="/").items():
        found |= in_few_bits(path, leaf, form)
    return unflatten_dict(found, sep="/")


def in_few_bits(path: str, leaf: Any, form: str) -> dict[str, Any]:
    """What holds one parameter: by path itself, or its values and their scale.

    Args:
        path: of the parameter, joined with "/".
        leaf: the parameter, or of one that is stacked a layer.
        form: a name in `FORMS`, or "".
    """
    if not form or _KERNEL.fullmatch(path) is None:
        return {path: leaf}
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        values, scale = _program(form, leaf.sharding)(leaf)
    else:
        values, scale = _rounded(form, leaf)
    return {path: values, path.removesuffix("kernel") + SCALE: scale}


@lru_cache
def _program(form: str, place: Sharding) -> Any:
    beside = replicated(place.mesh) if isinstance(place, NamedSharding) else place
    return jax.jit(partial(_rounded, form), out_shardings=(place, beside))


def _rounded(form: str, kernel: Any) -> tuple[Any, Any]:
    """The values of a kernel [... i o], and the scale [... o] that they are times.

    One that isn't finite makes its scale so.
    """
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    dtype, largest = FORMS[form]
    kernel = kernel.astype(np.float32)
    scale = xp.abs(kernel).max(axis=-2) / np.float32(largest)
    with np.errstate(invalid="ignore"):
        values = kernel / xp.where(scale > 0, scale, 1)[..., None, :]
        values = xp.round(values) if np.issubdtype(dtype, np.integer) else values
        return xp.clip(values, -largest, largest).astype(dtype), scale
