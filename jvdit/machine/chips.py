"""The table of chips: peak FLOP/s, memory, options, kernel blocks; and TPU slices."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of the flash attention kernels, from a sweep over their schedules.

    Attributes:
        ahead: largest blocks of the forward kernel, in tokens: queries; keys fetched at
            once; and keys, of those, computed at once.
        back: largest blocks of the backward kernel, likewise.
        cores: cores of a device, which share its memory and split a kernel.
        memory: bytes of on-chip memory of a core that a kernel may use.
        gradients: bytes of it for accumulating the gradients of queries.
    """

    ahead: tuple[int, int, int] = (1024, 2048, 512)
    back: tuple[int, int, int] = (1024, 2048, 1024)
    cores: int = 1
    memory: int = 56 * 2**20
    gradients: int = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device: its published figures, and the settings that suit it.

    Attributes:
        kind: prefix of JAX's `device_kind`.
        peak: bfloat16 FLOP/s without sparsity; 0: unknown.
        memory: bytes of HBM that a program can use.
        link: bytes/s of one link to a neighbouring chip, in one direction.
        network: bytes/s between slices, for each chip, in one direction.
        clock: cycles/s, derived from the peak and the FLOPs of a cycle.
        flash: share of the peak that the flash attention kernels reach, forward and
            backward: from their schedules (tools/kernel_schedules.py), less 5 % for
            the overhead between blocks; at most 0.8.
        watts: the most that it draws, as published; of a CPU, what a busy core draws on
            average (servers of 280 to 400 W with 48 to 96 cores: 4 to 8).
        options: XLA compiler options.
        blocks: block sizes of the flash attention kernels.
    """

    kind: str
    peak: float = 0.0
    memory: float = math.inf
    link: float = math.nan
    network: float = math.nan
    clock: float = math.nan
    flash: tuple[float, float] = (0.80, 0.80)
    watts: float = math.nan
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    blocks: Blocks = Blocks()


_GB = 2**30
_LARGE = {"memory": 112 * 2**20, "gradients": 88 * 2**20}
_SMALL = {"memory": 13 * 2**20, "gradients": 4 * 2**20}
# Lets all-to-alls, as of Ulysses attention, overlap with computation.
_ASYNC = {"xla_tpu_enable_async_all_to_all": "true"}
# Uses Eigen for float32 matrix products and convolutions: by default XLA uses YNNPACK,
# which takes up to 1.5 times as long.
_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        "TPU v4",
        275e12,
        watts=192.0,
        options=_ASYNC,
        blocks=Blocks((512, 1024, 512), (512, 512, 512), cores=2, **_SMALL),
    ),
    # No options: on slices of more than 16 chips the compiler refuses `_ASYNC`.
    "v5e": Chip(
        "TPU v5 lite",
        197e12,
        15.75 * _GB,
        link=45e9,
        network=3.125e9,
        clock=1.50e9,
        blocks=Blocks(**_LARGE),
    ),
    "v5p": Chip(
        "TPU v5",
        459e12,
        95.74 * _GB,
        link=90e9,
        network=6.25e9,
        clock=1.75e9,
        options=_ASYNC,
        blocks=Blocks(cores=2),
    ),
    # Its matrix units are 256 wide: products over the 128 channels of a head half fill
    # them, which limits the flash kernels.
    "v6e": Chip(
        "TPU v6 lite",
        918e12,
        31.25 * _GB,
        link=90e9,
        network=12.5e9,
        clock=1.75e9,
        flash=(0.55, 0.55),
        options=_ASYNC,
        blocks=Blocks((2048, 2048, 1024), (1024, 2048, 256), **_LARGE),
    ),
    "tpu": Chip("TPU", options=_ASYNC),
    "a100": Chip("NVIDIA A100", 312e12, watts=400.0),
    "h100": Chip("NVIDIA H100", 989e12, watts=700.0),
    "h200": Chip("NVIDIA H200", 989e12, watts=700.0),
    "cpu": Chip("cpu", watts=7.5, options=_EIGEN),
}
RENTED = ("v5e", "v5p", "v6e")  # chips whose slices programs are forecast for


def chip_of(kind: str) -> Chip:
    """The row of a chip by JAX's `device_kind`; an empty row if it is unknown."""
    known = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind), default=Chip(kind))


def this_chip() -> Chip:
    """The chip that programs are being traced for: that of the mesh, or the host's."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return chip_of(described.device_kind if described else jax.devices()[0].device_kind)


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_FLAT |= {256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
_CUBES |= {128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


def several(name: str) -> tuple[int, str]:
    """Splits the name of several slices: "2xv6e-64" is (2, "v6e-64")."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(v.*)", name)
    return (int(found[1] or 1), found[2]) if found else (1, name)


def topology(name: str) -> str:
    """Converts the name of a TPU slice to the topology that its compiler takes.

    Args:
        name: the name under which a slice is rented, such as "v6e-64" (for v5p the
            number counts cores, two in a chip), or a topology, such as "v6e:8x8".
            "2xv6e-64" is two slices.

    Returns:
        The topology, such as "v6e:8x8" or "2xv6e:8x8".

    Raises:
        ValueError: there is no such slice.
    """
    slices, alone = several(name)
    if slices > 1:
        return f"{slices}x{topology(alone)}"
    if re.fullmatch(rf"({'|'.join(RENTED)}):\d+x\d+(x\d+)?", name):
        return name
    kind, _, number = name.partition("-")
    known = {
        f"{chip}-{n * (2 if chip == 'v5p' else 1)}": f"{chip}:{shape}"
        for chip in RENTED
        for n, shape in (_CUBES if chip == "v5p" else _FLAT).items()
        if n > 1
    }
    if name in known:
        return known[name]
    alike = [slice for slice in known if slice.startswith(f"{kind}-")] or [*known]
    near = difflib.get_close_matches(name, alike, 1, 0)[0]
    if number.isdigit():
        wanted = math.log(max(int(number), 1))
        near = min(alike, key=lambda x: abs(wanted - math.log(int(x.split("-")[1]))))
    raise ValueError(
        f"topology {name!r} is not known; those of its kind are {', '.join(alike)}, or "
        f"CHIP:AxBxC; try {near!r}."
    )
