"""The mesh, and the two tables that place every array on it.

Activations are placed by the *names* of their axes (`ACTIVATIONS`, through
`constrain`), parameters by the *path* under which the model keeps them
(`PARAMETERS`, through `parameter_shardings`). Changing how jvdit is parallelised
means changing a row of these tables, not a model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvdit.machine.chips import chip_of

AXES = ("data", "fsdp", "context", "tensor")

# Name of an activation axis -> mesh axes that divide it.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "text": (),
    "heads": ("tensor",),
    "width": (),
    "ffn": ("tensor",),
    "frames": (),
    "side": ("context",),
    "channels": (),
}

# What divides the frames of a piece of video, by hand (`video_vae_chunked`).
FRAMES = "tensor"

# Parameter path (a regular expression, first match wins) -> rule. "fsdp" divides the
# largest divisible axis; "columns" first divides the last axis over `tensor`, and
# "rows" the one before it (Megatron, arXiv:1909.08053, section 3); "replicate" copies.
# Scalars and vectors are small enough to copy everywhere.
PARAMETERS: tuple[tuple[str, str], ...] = (
    (r".*/(bias|scale|gain|alpha|gamma|logit_scale)", "replicate"),
    (
        r".*_attention/(query|key|value)(_sound)?/kernel|.*/mlp/fc_in/kernel",
        "columns",
    ),
    (r".*_attention/out(_sound)?/kernel|.*/mlp/fc_out/kernel", "rows"),
    (r".*/(kernel|embedding|table(_sound)?|modulation|relative_bias)", "fsdp"),
    (r".*/lora_(a|b)", "fsdp"),
)
# Where `fsdp` has fewer devices, parameters are divided over `context` too. With more,
# the shards would be slivers, and gathering them slower, so then only if they wouldn't
# fit otherwise: if a training's five copies (weights, average, two moments, gradient)
# took more than half of the memory.
ENOUGH_SHARDS = 8
# Devices of a sampler that divide tokens alone. Of more, two divide heads: each then
# gathers half of the weights. A step of Wan 14B on 64 chips of v6e: 0.59 and 0.63 s.
MOST_CONTEXT = 16
COPIES, SHARE_OF_COPIES = 5, 0.5


def make_mesh(
    sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh `data x fsdp x context x tensor`.

    Args:
        sizes: devices along each axis; axes left out have 1, and one of them may be
            -1: whatever remains. Default: all devices on `data`.
        devices: the devices to use. Default: all.

    Raises:
        ValueError: an axis is unknown, or the sizes don't multiply to the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict({"data": -1} if sizes is None else sizes)
    if unknown := [name for name in sizes if name not in AXES]:
        raise ValueError(f"mesh axis `{unknown[0]}` is unknown; the axes are {AXES}.")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ValueError(
            f"mesh sizes {sizes} must be positive, with -1 for at most one axis."
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // known, 1)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh sizes {sizes} make {math.prod(shape)} devices but there are "
            f"{len(devices)}; use -1 for one axis to take what remains."
        )
    return _mesh(_grid(devices, shape))


def host_mesh() -> Mesh:
    """The devices of this host alone, each with rows of its own."""
    return _mesh(np.reshape(jax.local_devices(), (-1, 1, 1, 1)))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the sizes of a mesh, such as "fsdp=8,context=8".

    Raises:
        ValueError: it isn't written so.
    """
    try:
        return {k.strip(): int(n) for k, n in (x.split("=") for x in text.split(","))}
    except ValueError as error:
        raise ValueError(
            f"`mesh` (={text!r}) must be AXIS=DEVICES with commas between, such as "
            f"fsdp=8,context=8; the axes are {', '.join(AXES)}."
        ) from error


def sampling_sizes(rows: int, devices: int) -> dict[str, int]:
    """Sizes of a mesh that leaves no device idle, however few rows there are.

    Args:
        rows: that are solved at once; guidance makes them twice as many as clips.
        devices: how many there are; those that rows don't need divide tokens, and if
            they are many, heads.
    """
    data = math.gcd(1 << (max(rows, 1) - 1).bit_length(), devices)
    context = devices // data
    tensor = 2 if context > MOST_CONTEXT and context % 2 == 0 else 1
    return {"data": data, "context": context // tensor, "tensor": tensor}


def autoencoder_mesh(mesh: Mesh, height: int, width: int) -> Mesh:
    """The same devices, for an autoencoder of frames of so many latents.

    Of those along `context`, as many as divide the longer side do so; the others divide
    frames.
    """
    sizes = dict(mesh.shape)
    beside = math.gcd(max(height, width), sizes["context"])
    sizes[FRAMES] *= sizes["context"] // beside
    sizes["context"] = beside
    return _mesh(mesh.devices.reshape([sizes[axis] for axis in AXES]))


def frame_ways() -> int:
    """How many devices of the current mesh divide the frames of a piece of video."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[FRAMES]


def frames_divided() -> bool:
    """Whether what is traced sees the frames of one device alone."""
    return FRAMES in jax.sharding.get_abstract_mesh().manual_axes


def _grid(devices: list[Any], shape: list[int]) -> np.ndarray:
    """Lays devices out so that those along an axis are neighbours where links matter.

    Between the slices of a run on several lies a slow network, which only copies of
    the model (`data`), or else parts of its weights (`fsdp`), are divided by.
    """
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between = next((axis for axis in (0, 1) if shape[axis] % slices == 0), None)
    if between is None:
        raise ValueError(
            f"mesh sizes {dict(zip(AXES, shape, strict=True))} can't lie on {slices} "
            f"slices: make `data`, or else `fsdp`, a multiple of {slices}."
        )
    outer = [slices if axis == between else 1 for axis in range(len(shape))]
    inner = [size // n for size, n in zip(shape, outer, strict=True)]
    return create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def platform() -> str:
    """Of the devices that a program is traced for: "cpu", "gpu" or "tpu".

    Those of the current mesh, which need not be there: programs for a pod are compiled
    on a laptop. Without a mesh, the default backend's.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.platform if described else jax.default_backend()


def alone() -> bool:
    """Whether a program is traced for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def activation_spec(*axes: str | None) -> PartitionSpec:
    """The partition of an activation whose axes have these names.

    Raises:
        ValueError: a name is not in the table.
    """
    if unknown := [axis for axis in axes if axis not in (None, *ACTIVATIONS)]:
        known = f"unknown; known are {', '.join(ACTIVATIONS)}"
        raise ValueError(f"activation axis `{unknown[0]}` is {known}.")
    return PartitionSpec(*(ACTIVATIONS[a] or None if a else None for a in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Places an activation on the current mesh by the names of its axes.

    Does nothing without a mesh (`jax.set_mesh`), so that modules run anywhere. An
    axis whose size the mesh doesn't divide stays whole.

    Raises:
        ValueError: a name is unknown, or there is not one name for each axis.
    """
    spec = activation_spec(*axes)
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} axis names {axes} for an array of {x.ndim} axes")
    if alone():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, sizes))


def frame_axes(x: Any) -> tuple[str | None, ...]:
    """Names of the axes of frames [b f h w c], the longer side being divided.

    It is the longer one at every resolution, and more often a multiple of the devices.
    """
    wide = x.shape[3] > x.shape[2]
    return ("batch", "frames", *((None, "side") if wide else ("side", None)), None)


def fit(
    spec: PartitionSpec, shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Drops from a partition what doesn't divide the shape."""
    fitted = []
    for size, names in zip(shape, spec, strict=True):
        names = (names,) if isinstance(names, str) else (names or ())
        divides = size % math.prod(sizes[name] for name in names) == 0
        fitted.append(tuple(names) if names and divides else None)
    return PartitionSpec(*fitted)


def shard_axes(params: Any, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes over which a tree of parameters is divided.

    A device is known by its kind alone, so that all hosts of a run decide the same.
    """
    ways = mesh.shape["fsdp"]
    copies = COPIES * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    room = SHARE_OF_COPIES * chip_of(mesh.devices.flat[0].device_kind).memory
    enough = ways >= ENOUGH_SHARDS and copies / ways <= room
    return ("fsdp",) if enough else ("fsdp", "context")


def parameter_spec(
    path: str, shape: Sequence[int], sizes: Mapping[str, int], names: Sequence[str]
) -> PartitionSpec:
    """The partition of one parameter (or of its moment or average).

    Args:
        path: of the parameter, as in `PARAMETERS`.
        shape: of the parameter.
        sizes: of the mesh.
        names: from `shard_axes`.

    Raises:
        ValueError: no rule of `PARAMETERS` matches the path.
    """
    rules = [rule for pattern, rule in PARAMETERS if re.fullmatch(pattern, path)]
    if not rules:
        raise ValueError(f"no rule in sharding.PARAMETERS places parameter `{path}`.")
    if rules[0] == "replicate" or len(shape) < 2:
        return PartitionSpec()
    places: list[tuple[str, ...]] = [()] * len(shape)
    turned = {"columns": len(shape) - 1, "rows": len(shape) - 2}.get(rules[0])
    if turned is not None and shape[turned] % sizes["tensor"] == 0:
        places[turned] = ("tensor",)
    for axes in (tuple(names), tuple(names[:1])):
        ways = math.prod(sizes[name] for name in axes)
        free = [a for a, n in enumerate(shape) if not places[a] and n % ways == 0]
        if ways > 1 and free:
            places[max(free, key=lambda a: shape[a])] = axes
            break
    used = [tuple(name for name in place if sizes[name] > 1) for place in places]
    return PartitionSpec(*used) if any(used) else PartitionSpec()


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of parameters, by `PARAMETERS`."""
    names = shard_axes(params, mesh)

    def place(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        spec = parameter_spec(name, leaf.shape, mesh.shape, names)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`; everything else of a batch whole."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATIONS["batch"]))


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """As `batch_sharding`; all rows everywhere if the mesh doesn't divide them.

    So begin the few rows of a sampler, which guidance doubles within the program.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return replicated(mesh) if rows % ways else batch_sharding(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
