"""Where the parameters of several networks are: on the devices, or waiting."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jvdit.sharding import parameter_shardings, shard_axes
from jvdit.weights.network import Parameters

_SHARE = 0.8  # of the memory may be parameters; the rest is for activations


class Residence(Mapping[str, Any]):
    """Parameters by the name of their network, brought to the mesh when asked for.

    Args:
        sources: of each network: a tree, which stays on the mesh once it was asked for,
            or a function that brings one there, from files for example.
        mesh: where to.
        together: whether what functions brought stays when another network is asked
            for. False: one of them is there at a time.
    """

    def __init__(self, sources: Mapping[str, Parameters], mesh: Mesh, together: bool):
        self._sources = dict(sources)
        self._mesh = mesh
        self._together = together
        self._placed: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if not self._together:
            self._leave(name)
        if name not in self._placed:
            source = self._sources[name]
            if callable(source):
                self._placed[name] = source()
            else:
                places = parameter_shardings(source, self._mesh)
                self._placed[name] = jax.device_put(source, places)
        return self._placed[name]

    def __iter__(self):
        return iter(self._sources)

    def __len__(self):
        return len(self._sources)

    def update(self, params: Mapping[str, Any]) -> None:
        """Replaces parameters by others that are already on the mesh."""
        self._placed.update(params)

    def _leave(self, but: str) -> None:
        for name, source in self._sources.items():
            if callable(source) and name != but:
                self._placed.pop(name, None)


def fits_together(num_bytes: int, mesh: Mesh) -> bool:
    """Whether parameters of so many bytes fit on the devices with room to work in.

    Devices that don't tell their memory are taken for the host's.
    """
    device = mesh.devices.flat[0]
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit //= mesh.devices.size
    ways = math.prod(mesh.shape[name] for name in shard_axes({}, mesh))
    return num_bytes <= _SHARE * limit * ways
