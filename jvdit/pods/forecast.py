"""Forecasts the time of a compiled TPU program, without a TPU.

XLA's compiler writes the cycles that it expects beside almost every instruction. Flash
attention, which it can't see into, is timed as its FLOPs over the speed of its kernels'
schedules, and collectives as their bytes over the bandwidth of the links, overlapped
with whatever computes meanwhile. Counted in this way, a training step of Wan 2.1 14B on
v5p-8 takes 32.7 s, where MaxDiffusion publishes 36.0 s, and a guided sampling step on
eight v7x chips 2.68 s, where it publishes 2.73 s. These are estimates: trust ratios
more than seconds.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jvdit.machine.chips import Chip
from jvdit.models.dit_blocks import CHOICE
from jvdit.pods.program_text import Instruction, Program, arrays, byte_sizes, group

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_SLICE = 100_000  # difference of device ids from slice to slice


def _sums() -> Any:
    return dataclasses.field(default_factory=lambda: collections.defaultdict(float))


@dataclasses.dataclass
class Forecast:
    """The forecast of one program on each chip.

    Attributes:
        seconds: duration of the program.
        parts: seconds by kind of work: "products" (matrix products and convolutions),
            "attention" (flash kernels), "other", and "links" (waiting for collectives).
        sources: seconds by part of the model.
        sent: bytes that a chip sends, by (collective, mesh axes).
    """

    seconds: float = 0.0
    parts: dict[str, float] = _sums()
    sources: dict[str, float] = _sums()
    sent: dict[tuple[str, str], float] = _sums()


def forecast(program: Program, chip: Chip, axes: Mapping[str, int]) -> Forecast:
    """Adds up the time of a program's instructions.

    Args:
        program: the compiled program, from `read`.
        chip: the chip that it was compiled for.
        axes: sizes of the mesh axes by name, in the order of the devices.
    """
    walk = _Walk(program, chip, axes)
    walk.result.seconds = walk.run(program.entry, 1.0)
    return walk.result


class _Walk:
    def __init__(self, program: Program, chip: Chip, axes: Mapping[str, int]):
        self.program, self.chip, self.axes = program, chip, axes
        self.devices = int(np.prod([*axes.values()]))
        self.result = Forecast()

    def run(self, name: str, times: float) -> float:
        """Seconds of one run of a computation; its parts are counted `times` times."""
        now = wire = 0.0  # times until which the core and the links are busy
        arrivals: dict[str, float] = {}
        network = _Network(self.chip.network)
        for each in self.program.computations[name]:
            base = each.op.removesuffix("-start").removesuffix("-done")
            inside = self.program.inside(each) if each.op == "fusion" else []
            inner = next((x for x in inside if x.op in COLLECTIVES), None)
            if each.op.endswith("-start") and base in COLLECTIVES:
                wire = max(wire, now) + self._transfer(each, base, times)
                arrivals[each.name] = wire
            elif inner is not None and "start" in each.name:
                wire = max(wire, now) + self._transfer(inner, inner.op, times)
                arrivals[each.name.replace("start", "done")] = wire
            elif each.op.endswith("-done") and base in COLLECTIVES:
                now += self._wait(arrivals.get(each.operands[0], now) - now, times)
            elif each.op in ("send", "recv") and "_xla_megascale" in each.text:
                kind, sent = network.meet(each, now)
                self.result.sent[kind, "slices"] += sent * times
            elif each.op == "recv-done":
                now += self._wait(network.arrival(each.operands[0]) - now, times)
            elif each.name in arrivals:
                now += self._wait(arrivals[each.name] - now, times)
            elif base in COLLECTIVES:
                now += self._wait(self._transfer(each, base, times), times)
            elif inner is not None and each.cycles is None:
                # An all-reduce and a slice make a reduce-scatter.
                both = {"all-reduce", "dynamic-slice"} <= {x.op for x in inside}
                kind = "scattered" if both else inner.op
                now += self._wait(self._transfer(inner, kind, times), times)
            else:
                now += self._work(each, inside or [each], times)
        return now

    def _work(
        self, each: Instruction, inside: Sequence[Instruction], times: float
    ) -> float:
        """Seconds of an instruction that the core computes.

        A flash kernel is one of those inside, as of a fusion that slices its inputs.
        """
        if each.op == "while":
            trips = self.program.trips(each)
            return trips * self.run(each.attribute("body"), times * trips)
        if each.op == "call":
            return self.run(each.attribute("to_apply"), times)
        if each.op == "conditional":
            names = self.program.branches(each)
            # Of a choice in the backward pass only what is chosen knows its source.
            inner = (x for name in names for x in self.program.computations[name])
            if any(CHOICE in x.source for x in inner):  # layers take each as often
                return sum(self.run(x, times / len(names)) for x in names) / len(names)
            return max((self.run(x, times) for x in names), default=0.0)
        kernel = next((x for x in inside if '"tpu_custom_call"' in x.text), None)
        if kernel is not None:
            return self._add("attention", kernel, self._flash(kernel), times)
        if each.cycles is None or each.op.endswith("-start"):
            return 0.0
        kind = "products" if "kind=kOutput" in each.text else "other"
        kind = "products" if each.op == "convolution" else kind
        return self._add(kind, each, each.cycles / self.chip.clock, times)

    def _add(self, kind: str, each: Instruction, seconds: float, times: float) -> float:
        self.result.parts[kind] += seconds * times
        self.result.sources[_part(each.source)] += seconds * times
        return seconds

    def _wait(self, seconds: float, times: float) -> float:
        seconds = max(seconds, 0.0)
        self.result.parts["links"] += seconds * times
        return seconds

    def _flash(self, each: Instruction) -> float:
        layouts = each.text.partition("operand_layout_constraints=")[2]
        # Queries and keys come first.
        kinds = ("bf16", "f32", "f16")
        operands = [s for kind, s in arrays(layouts) if kind in kinds and len(s) > 2]
        *heads, queries, channels = operands[0]
        product = 2 * math.prod(heads) * queries * operands[1][-2] * channels
        forward, backward = self.chip.flash
        products, speed = (5, backward) if "backward" in each.name else (2, forward)
        return products * product / (self.chip.peak * speed)

    def _transfer(self, each: Instruction, kind: str, times: float) -> float:
        """Seconds of a collective on the links; also counts the bytes a chip sends."""
        together = group(each.text, self.devices)
        size = 2 if kind == "collective-permute" else len(together)
        whole = max(byte_sizes(each.shape), default=0.0)
        if kind != "all-gather" and not each.op.endswith("-start"):
            whole = sum(byte_sizes(each.shape))
        share, both = (size - 1) / size, 2 * self.chip.link
        sent, bandwidth = {
            "all-gather": (whole * share, both),
            "all-reduce": (2 * whole * share, both),
            "reduce-scatter": (whole * (size - 1), both),
            "scattered": (whole * share, both),
            # Data travel a quarter of the ring, on average.
            "all-to-all": (whole * share, both * 4 * share / max(size, 4)),
            "collective-permute": (whole, self.chip.link),
        }[kind]
        self.result.sent[
            kind.replace("scattered", "reduce-scatter"), self._along(together)
        ] += sent * times
        return sent / bandwidth if size > 1 else 0.0

    def _along(self, together: np.ndarray) -> str:
        """The mesh axes along which a group of devices lies."""
        places = np.unravel_index(together, tuple(self.axes.values()))
        names = [n for n, x in zip(self.axes, places, strict=True) if len(set(x)) > 1]
        return "+".join(names) or "none"


class _Network:
    """Transfers between slices: one after another, through their hosts."""

    def __init__(self, bandwidth: float):
        self.bandwidth, self.busy = bandwidth, 0.0
        self.sizes: dict[str, float] = {}
        self.meetings: dict[str, str] = {}
        self.arrivals: dict[str, float] = {}

    def meet(self, each: Instruction, now: float) -> tuple[str, float]:
        """Records a send or receive; a transfer begins when both have been met.

        Returns:
            The kind of collective, and the bytes that a chip sends (0 for the first
            of the two).
        """

        def told(name: str) -> str:
            return re.findall(rf'_xla_{name}=("[^"]*"|{{{{.*?}}}})', each.text)[0]

        meeting = told("host_transfer_rendezvous")
        kind = told("megascale_transfer_type").strip('"').lower().replace("_", "-")
        size = max(byte_sizes(each.shape), default=0.0)
        self.meetings[each.name] = meeting
        if meeting not in self.sizes:
            self.sizes[meeting] = size
            return kind, 0.0
        slices = _slices(told("megascale_target"))
        size = max(size, self.sizes.pop(meeting))
        if kind != "one-to-one":
            size *= (slices - 1) / slices
        size *= 2 if kind == "all-reduce" else 1
        self.busy = max(self.busy, now) + size / self.bandwidth
        self.arrivals[meeting] = self.busy
        return kind, size

    def arrival(self, received: str) -> float:
        """The time at which a transfer arrives; 0 if it was never sent."""
        return self.arrivals.get(self.meetings.get(received, ""), 0.0)


def _slices(target: str) -> int:
    """How many slices "{1,2}x{0:7}", or a list of device ids, names."""
    listed = re.findall(r"[\d,:]+", target)[0]
    if ":" in listed:
        first, last = map(int, listed.split(":"))
        return last - first + 1
    names = map(int, listed.split(","))
    return len({name // _SLICE if name >= _SLICE else name for name in names})


_PARTS = (
    ("self_attention", "self-attention"),
    ("cross_attention", "cross-attention"),
    ("mlp", "MLP"),
    ("/blocks", "rest of the blocks"),
    ("TextEncoder", "text encoder"),
    ("VideoVAE", "autoencoder"),
    ("DiT", "around the blocks"),
)


def _part(source: str) -> str:
    return next((told for name, told in _PARTS if name in source), "update of weights")
