"""Energy in joules: measured where the machine has counters, modelled elsewhere.

No number is without its source. Measured: NVML's counter of each GPU (Volta or newer;
`pip install nvidia-ml-py`), and RAPL's of the CPU packages and their memory, if the
user may read it. Modelled: time x watts of the table of chips, which is the most that
an accelerator draws, and of a core on average. Cooling and conversion aren't included.
"""

import dataclasses
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jvdit.machine.chips import CHIPS, this_chip

_POWERCAP = Path("/sys/class/powercap")
_WATTS = "JVDIT_WATTS"  # variable: watts of an accelerator, or of a core
_REST = 0.5  # seconds in which the power at rest is measured


@dataclasses.dataclass(frozen=True)
class Energy:
    """Some energy, and how it is known.

    Attributes:
        joules: of the machine; NaN: unknown.
        source: how it is known, or why it isn't.
        idle: joules, among these, that the machine takes at rest; NaN: unknown.
    """

    joules: float
    source: str
    idle: float = math.nan

    def __add__(self, other: "Energy") -> "Energy":
        """The sum, with both sources if they differ."""
        told = dict.fromkeys([*self.source.split("; "), other.source])
        sums = self.joules + other.joules, self.idle + other.idle
        return Energy(sums[0], "; ".join(told), sums[1])

    def __mul__(self, share: float) -> "Energy":
        """A part of it."""
        return Energy(self.joules * share, self.source, self.idle * share)

    @property
    def told(self) -> dict[str, Any]:
        """JSON values: `joules` (null: unknown), `source`, perhaps `idle_joules`."""
        parts = {"joules": self.joules, "source": self.source, "idle_joules": self.idle}
        if math.isnan(self.idle):
            del parts["idle_joules"]
        parts["joules"] = None if math.isnan(self.joules) else round(self.joules, 3)
        return parts

    def __str__(self) -> str:
        if math.isnan(self.joules):
            return f"energy unknown ({self.source})"
        rest = "" if math.isnan(self.idle) else f", {_prefixed(self.idle)} of it idle"
        return f"{_prefixed(self.joules)}{rest} ({self.source})"


def _prefixed(joules: float) -> str:
    """Joules in three digits: 62.1 J, 1.84 kJ."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if joules >= factor:
            return f"{joules / factor:.3g} {prefix}J"
    return f"{joules:.3g} J"


class Counter(NamedTuple):
    """What knows the energy of a part of a machine.

    Attributes:
        source: how.
        joules: reads those since any fixed time.
    """

    source: str
    joules: Callable[[], float]


class Meter:
    """Measures the energy of this process's devices and CPU from lap to lap.

    Counters are of the whole device, whoever uses it. Of several processes of one run
    each counts as much as this one. RAPL's counters wrap, the fastest within minutes:
    read them that often.

    Args:
        parts: of the machine; None: those of this one.
    """

    def __init__(self, parts: list[Counter] | None = None):
        self._parts = _parts() if parts is None else parts
        self._hosts = jax.process_count()
        self.source = " + ".join(dict.fromkeys(part.source for part in self._parts))
        self.source += f", x {self._hosts} processes" * (self._hosts > 1)
        self._rest = math.nan
        self._begun = self._last = self._read()
        if self.source.startswith("measured"):
            time.sleep(_REST)
            rest = self.lap()
            self._rest = rest.joules / (self._last[1] - self._begun[1])
            self._begun = self._last

    def _read(self) -> tuple[float, float]:
        """Joules and seconds."""
        joules = sum(part.joules() for part in self._parts)
        return joules * self._hosts, time.monotonic()

    def _between(self, then: tuple[float, float], now: tuple[float, float]) -> Energy:
        spent, seconds = (b - a for a, b in zip(then, now, strict=True))
        return Energy(spent, self.source, self._rest * seconds)

    def lap(self) -> Energy:
        """The energy since the last lap, or since the meter was made."""
        before, self._last = self._last, self._read()
        return self._between(before, self._last)

    @property
    def total(self) -> Energy:
        """The energy since the meter was made."""
        return self._between(self._begun, self._read())


class Shares:
    """Energy of things of which several are made together, one after the other.

    Args:
        meter: that is read whenever one is there.
    """

    def __init__(self, meter: Meter):
        self._meter, self._left = meter, 0

    def next(self, together: int) -> Energy:
        """The energy of the next one: its share, and what it took by itself.

        Args:
            together: how many it was made among.
        """
        spent = self._meter.lap()
        self._left -= 1
        if self._left >= 0:
            return self._each + spent
        self._each, self._left = spent * (1 / together), together - 1
        return self._each


def _parts() -> list[Counter]:
    """The parts of this machine: what is measured comes first."""
    found = nvml() if jax.default_backend() == "gpu" else []
    if not found and jax.default_backend() != "cpu":
        found = [_modelled()]
    cpu = rapl(_POWERCAP) or [_cores()]
    return sorted(found + cpu, key=lambda part: not part.source.startswith("measured"))


def _watts(usual: float) -> float:
    """Watts of a chip or core: the user's, or those of the table; NaN: unknown."""
    try:
        return float(os.environ.get(_WATTS) or usual)
    except ValueError:
        raise ValueError(f"{_WATTS} (={os.environ[_WATTS]!r}) must be watts.") from None


def _modelled() -> Counter:
    """Accelerators by their time: all of them, at the most that they draw."""
    count, chip = jax.local_device_count(), this_chip()
    watts, begun = _watts(chip.watts), time.monotonic()
    if math.isnan(watts):
        told = f"unknown: {chip.kind} has no counter and no published watts; {_WATTS}=…"
        return Counter(told, lambda: math.nan)
    told = f"modelled: {count} x {chip.kind} x {watts:g} W"
    return Counter(told, lambda: count * watts * (time.monotonic() - begun))


def _cores() -> Counter:
    """This process's cores by their time."""
    on_cpu = jax.default_backend() == "cpu"
    watts = _watts(CHIPS["cpu"].watts) if on_cpu else CHIPS["cpu"].watts
    told = f"modelled: CPU time x {watts:g} W a core"
    return Counter(told, lambda: time.process_time() * watts)


def rapl(folder: Path) -> list[Counter]:
    """RAPL's counters of the CPU packages and of the memory beside them.

    Those inside a package are part of it, and that of the whole platform ("psys") of
    all; what the user may not read is left out.

    Args:
        folder: of the kernel's power caps.
    """
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                found.append(Counter("measured: RAPL", _unwrapped(zone)))
        except (OSError, ValueError):
            continue
    return found


def _unwrapped(zone: Path) -> Callable[[], float]:
    """Reads a counter of microjoules that begins anew after its largest number."""

    def read() -> int:
        return int((zone / "energy_uj").read_text())

    last, laps, most = read(), 0, int((zone / "max_energy_range_uj").read_text())

    def joules() -> float:
        nonlocal last, laps
        now = read()
        laps, last = laps + (now < last), now
        return (laps * (most + 1) + now) / 1e6

    return joules


def nvml(environment: Mapping[str, str] = os.environ) -> list[Counter]:
    """NVML's counters of the GPUs that JAX uses; []: there are none.

    Args:
        environment: holds CUDA_VISIBLE_DEVICES, which NVML doesn't heed.
    """
    try:
        # By its name alone: a checkout without a GPU need not have it.
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        library.nvmlInit()
    except library.NVMLError:  # there is no driver
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    found = []
    for device in jax.local_devices():
        at = device.local_hardware_id or 0
        name = visible[at].strip() if visible != [""] else str(at)
        try:
            if name.isdigit():
                handle = library.nvmlDeviceGetHandleByIndex(int(name))
            else:
                handle = library.nvmlDeviceGetHandleByUUID(name)
            read = library.nvmlDeviceGetTotalEnergyConsumption
            read(handle)  # millijoules; older GPUs have no such counter
        except library.NVMLError:
            return []
        found.append(Counter("measured: NVML", lambda h=handle, r=read: r(h) / 1e3))
    return found
