"""The networks of a model on the devices: what they take there, and which stay."""

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings, shard_axes
from jvdit.weights.few_bits import FORMS, NETWORKS, few_bits
from jvdit.weights.parameters import Network, Parameters

_SHARE = 0.8  # share of memory that parameters may take; activations need the rest
_CALLED = {
    "dit": "the DiT",
    "dit_low": "its expert for low noise",
    "text_encoder": "the text encoder",
    "image_encoder": "the image encoder",
    "vae": "the autoencoder",
    "audio_vae": "that of sound",
}


@dataclasses.dataclass(frozen=True)
class Room:
    """The memory of the devices, and what networks take of it.

    Attributes:
        networks: by name.
        mesh: the device mesh over which they are sharded.
        form: in which `few_bits` holds large ones; "": as they are.
    """

    networks: Mapping[str, Network]
    mesh: Mesh
    form: str = ""

    def sizes(self, form: str) -> dict[str, int]:
        """Bytes of the parameters of each network, if large ones are in a form."""
        return {
            name: network.num_bytes(form * (name in NETWORKS))
            for name, network in self.networks.items()
        }

    @cached_property
    def memory(self) -> int:
        """Bytes of the devices that parameters are divided over.

        A device that doesn't report its memory is assumed to share the host's.
        """
        limit = (self.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
        if limit is None:
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            limit //= self.mesh.devices.size
        return limit * self._ways

    @property
    def together(self) -> bool:
        """Whether all fit at a time, and leave room for activations.

        A tree of parameters is kept in any case, so only what is loaded from files
        counts.
        """
        sizes = self.sizes(self.form)
        loaded = [name for name, x in self.networks.items() if callable(x.source)]
        return sum(sizes[name] for name in loaded) <= _SHARE * self.memory

    @property
    def told(self) -> str:
        """A line: what each network takes, of how much, and what would take less.

        Raises:
            ValueError: one alone is larger than the memory; says what makes it fit.
        """
        sizes = self.sizes(self.form)
        most = max(sizes, key=lambda name: sizes[name])
        if sizes[most] > self.memory:
            raise ValueError(
                f"{self._takes(most)}; {self._devices} {_size(self.memory)}: "
                f"{self._remedy}."
            )
        parts = [f"{_CALLED[name]} {_size(x)}" for name, x in sizes.items()]
        how = "together" if self.together else "one at a time"
        kind = f" in {self.form}" if self.form else ""
        line = f"weights{kind}: {', '.join(parts)}; kept {how}, and {self._devices} "
        line += _size(self.memory)
        tight = sizes[most] > _SHARE * self.memory
        return line + (f"; little is left: {self._remedy}" if tight else "")

    def _takes(self, name: str) -> str:
        """What a network takes as it is, and what it would take in other forms."""
        network = self.networks[name]
        plain = jnp.dtype(network.module.param_dtype).name
        forms = [self.form] if self.form else ["", *(FORMS if name in NETWORKS else ())]
        told = [f"{_size(network.num_bytes(x))} in {x or plain}" for x in forms]
        return f"{_CALLED[name]} takes {' and '.join(told)}"

    @property
    def _remedy(self) -> str:
        """What makes the largest network fit, with room for activations."""
        room = _SHARE * self.memory
        for form in FORMS if not self.form else ():
            if max(self.sizes(form).values()) <= room:
                return f"add --quantize={form}"
        ways = math.ceil(max(self.sizes(self.form).values()) / room * self._ways)
        ways = 1 << (ways - 1).bit_length()
        return f"divide it over {ways} such devices (--mesh=context={ways})"

    @property
    def _ways(self) -> int:
        return math.prod(self.mesh.shape[name] for name in shard_axes({}, self.mesh))

    @property
    def _devices(self) -> str:
        kind = self.mesh.devices.flat[0].platform.upper()
        if kind == "CPU":
            return "this machine has"
        return f"this {kind} has" if self._ways == 1 else f"{self._ways} {kind}s have"


@dataclasses.dataclass(eq=False)
class Residence:
    """Maps network names to parameters, placed on the mesh when they are looked up.

    Attributes:
        sources: for each network either a parameter tree, which stays on the mesh after
            its first use, or a function that loads one onto the mesh, from files for
            example.
        mesh: the device mesh.
        together: True keeps loaded parameters on the mesh; False frees those of the
            other networks when one is looked up, so that one is there at a time.
        form: in which `few_bits` holds the kernels of large networks; "": as they are.
    """

    sources: Mapping[str, Parameters]
    mesh: Mesh
    together: bool
    form: str = ""
    _placed: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

    def __getitem__(self, name: str) -> Any:
        if not self.together:
            for other, source in self.sources.items():
                if callable(source) and other != name:
                    self._placed.pop(other, None)
        if name not in self._placed:
            source, form = self.sources[name], self.form * (name in NETWORKS)
            if callable(source):
                self._placed[name] = source(form) if form else source()
            else:
                source = few_bits(source, form)
                places = parameter_shardings(source, self.mesh)
                self._placed[name] = jax.device_put(source, places)
        return self._placed[name]

    def update(self, params: Mapping[str, Any]) -> None:
        """Replaces the parameters of some networks by others already on the mesh."""
        self._placed.update(params)


def _size(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / unit:.1f} {name}"
