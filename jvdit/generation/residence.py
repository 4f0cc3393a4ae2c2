"""Keeps the parameters of several networks on the devices, or loads them in turn."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings, shard_axes
from jvdit.weights.parameters import Parameters

_SHARE = 0.8  # share of memory that parameters may take; activations need the rest


class Residence:
    """Maps network names to parameters, placed on the mesh when they are looked up.

    Args:
        sources: for each network either a parameter tree, which stays on the mesh after
            its first use, or a function that loads one onto the mesh, from files for
            example.
        mesh: the device mesh.
        together: True keeps loaded parameters on the mesh; False frees those of the
            other networks when one is looked up, so that one is there at a time.
    """

    def __init__(self, sources: Mapping[str, Parameters], mesh: Mesh, together: bool):
        self._sources = dict(sources)
        self._mesh = mesh
        self._together = together
        self._placed: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if not self._together:
            for other, source in self._sources.items():
                if callable(source) and other != name:
                    self._placed.pop(other, None)
        if name not in self._placed:
            source = self._sources[name]
            if callable(source):
                self._placed[name] = source()
            else:
                places = parameter_shardings(source, self._mesh)
                self._placed[name] = jax.device_put(source, places)
        return self._placed[name]

    def update(self, params: Mapping[str, Any]) -> None:
        """Replaces the parameters of some networks by others already on the mesh."""
        self._placed.update(params)


def fits_together(num_bytes: int, mesh: Mesh) -> bool:
    """Whether parameters fit on the devices and leave room for activations.

    A device that doesn't report its memory is assumed to share the host's.

    Args:
        num_bytes: size of all parameters together.
        mesh: the device mesh over which they are sharded.
    """
    limit = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit //= mesh.devices.size
    ways = math.prod(mesh.shape[name] for name in shard_axes({}, mesh))
    return num_bytes <= _SHARE * limit * ways
