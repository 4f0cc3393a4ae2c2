"""TPU chips, and the slices of them that can be rented."""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a TPU can do, as published.

    Attributes:
        kind: what JAX calls it.
        peak: bfloat16 FLOP/s.
        memory: bytes of HBM that a program can have.
        link: bytes/s of one link to a neighbour, in one direction.
        network: bytes/s between slices, of each chip, in one direction.
        clock: cycles/s, from the peak and the products of a cycle.
        flash: share of the peak that the flash attention kernels reach, forward and
            backward: from their schedules (tools/kernel_schedules.py), less a twentieth
            for what lies between blocks; 0.8 at the most.
    """

    kind: str
    peak: float
    memory: float
    link: float
    network: float
    clock: float
    flash: tuple[float, float]


# By the name before the colon of a topology. v6e's matrix units are 256 wide: products
# over 128 channels fill them by half, others by the kernels' order.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        "TPU v5 lite", 197e12, 15.75 * 2**30, 45e9, 3.125e9, 1.50e9, (0.80, 0.80)
    ),
    "v5p": Chip("TPU v5", 459e12, 95.74 * 2**30, 90e9, 6.25e9, 1.75e9, (0.80, 0.80)),
    "v6e": Chip(
        "TPU v6 lite", 918e12, 31.25 * 2**30, 90e9, 12.5e9, 1.75e9, (0.55, 0.55)
    ),
}
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_FLAT |= {256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
_CUBES |= {128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


def memory_of(kind: str) -> float:
    """Bytes that a program can have on a chip that JAX calls so; infinite: unknown."""
    known = {chip.kind: chip.memory for chip in CHIPS.values()}
    return known.get(kind, math.inf)


def several(name: str) -> tuple[int, str]:
    """How many slices "2xv6e-64" has, and what one of them is called."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(v.*)", name)
    return (int(found[1] or 1), found[2]) if found else (1, name)


def topology(name: str) -> str:
    """The name of a slice as its compiler knows it.

    Args:
        name: "v6e-64", as it is rented (the number after v5p counts cores, two in a
            chip), or "v6e:8x8". Several such slices are "2xv6e-64", here and there.

    Raises:
        ValueError: there is no such slice.
    """
    slices, alone = several(name)
    if slices > 1:
        return f"{slices}x{topology(alone)}"
    if re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+(x\d+)?", name):
        return name
    kind, _, number = name.partition("-")
    known = {
        f"{chip}-{n * (2 if chip == 'v5p' else 1)}": f"{chip}:{shape}"
        for chip in CHIPS
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
