"""Keeps the parameters of several networks on the devices, or loads them in turn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings
from jvdit.weights.few_bits import NETWORKS, few_bits
from jvdit.weights.parameters import Parameters


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
