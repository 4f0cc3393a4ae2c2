"""The interface between the training loop and each kind of training."""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jvdit.config import Config
from jvdit.data.builders import Arrays, ClipBatches
from jvdit.data.clips import Source
from jvdit.data.packed_batches import PackedBatches
from jvdit.data.pipeline import Batches
from jvdit.data.sources import open_source
from jvdit.machine.cluster import share_of_rows
from jvdit.sharding import batch_sharding
from jvdit.training.metrics import Metrics
from jvdit.training.optim import Optim
from jvdit.training.step import Objective


class Task(ABC):
    """One kind of training.

    Attributes:
        objective: the training objective.
        identity: settings that may not change within a workdir, as JSON values.
        networks: classes of the networks (and the noise path) in the identity, by name.
        optim: optimizer settings.
        frozen: parameters that aren't trained, by network.
        fresh: networks that begin fresh whatever `start_from` holds.
        fingerprint: digest of the data and their order.
        example: a batch, for its shapes.
        hosts: into how many parts a batch is divided, of which each process reads one.
        share: which part this process reads, and how long it waits, for batch builders.
        flops: FLOPs of a training step, forward and backward; 0 if not known.
        summary: a line about data and batches.
        batch_builder: builds batch number i of this process.
    """

    objective: Objective
    identity: dict[str, Any]
    networks: ClassVar[dict[str, type]]
    fingerprint: str
    example: dict[str, np.ndarray]
    fresh: tuple[str, ...] = ()
    flops: float = 0.0
    summary: str = ""
    batch_builder: PackedBatches | ClipBatches
    _host_only = ("clip_id", "fps")

    def __init__(self, config: Config, mesh: Mesh, workdir: pathlib.Path):
        self.config, self.mesh, self.workdir = config, mesh, workdir
        self.optim = Optim(**config.optim.to_dict())
        host, self.hosts = share_of_rows(mesh)
        timeout = config.data.timeout
        self.share = {"host": host, "hosts": self.hosts, "timeout": timeout}
        self.frozen: Mapping[str, Any] = {}
        data = config.data
        self.sources = [self.open(name) for name in data.sources]
        if data.weights and len(data.weights) != len(self.sources):
            raise ValueError(
                f"`data.weights` (={data.weights}) must have one number for each of "
                f"the {len(self.sources)} `data.sources`, or be ()."
            )

    def open(self, name: str) -> Source:
        """Opens a data source by its name in the config."""
        return open_source(name)

    def objective_at(self, step: int) -> Objective:
        """The objective after so many steps; its parameters never change."""
        return self.objective

    @abstractmethod
    def counts(self, batch: Arrays) -> dict[str, float]:
        """How many "clips" (and "tokens") a batch has, over all hosts."""

    @abstractmethod
    def validate(self, params: Any) -> dict[str, float]:
        """Validation metrics on held-out clips, by name; {} if there are none."""

    @abstractmethod
    def show(self, params: Any, metrics: Metrics, step: int, folder: pathlib.Path):
        """Writes samples or reconstructions to `folder`, and logs them to `metrics`."""

    @abstractmethod
    def save(self, params: Any, folder: pathlib.Path) -> None:
        """Writes the finished model to a folder."""

    def batches(self, start: int) -> Batches:
        """Iterates over the batches, starting with that of step `start`."""
        data = self.config.data
        return Batches(
            self.batch_builder,
            start=start,
            num_threads=data.threads,
            num_workers=data.workers,
            buffer_bytes=data.prefetch_bytes,
            max_bad=data.max_bad,
        )

    def place(self, batch: Arrays) -> dict[str, jax.Array]:
        """Places this host's part of a batch on the mesh, as global arrays."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
            if name not in self._host_only
        }

    def names(self, batch: Arrays) -> list[str]:
        """The clips of a batch, each as "source:index"."""
        ids = [int(i) for i in batch["clip_id"].flat if i >= 0]
        located = map(self.batch_builder.locate, ids)
        return [f"{self.config.data.sources[s]}:{i}" for s, i in located]

    def compare_data(self, saved: dict[str, Any]) -> str:
        """A warning if a checkpoint was made with other data, else "".

        Args:
            saved: data position in the checkpoint; {} for a new run.
        """
        if not saved or saved["fingerprint"] == self.fingerprint:
            return ""
        return (
            "the data or its order differ from those of the checkpoint: training goes "
            "on, but not through the clips that it would have seen."
        )

    def check_rows(self, accumulate: int) -> None:
        """Checks that batches can be divided over the devices; see `check_division`."""
        rows = len(self.example["clip_id"]) * self.hosts
        tokens = self.config.data.get("token_budget", 0)
        check_division(rows, tokens, self.mesh, accumulate)


def check_division(rows: int, tokens: int, mesh: Mesh, accumulate: int) -> None:
    """Checks that a batch can be divided over devices and accumulated parts.

    Args:
        rows: rows of the whole batch.
        tokens: tokens of a row; 0 for batches of pixels.
        mesh: the device mesh.
        accumulate: into how many parts a batch is split for gradient accumulation.

    Raises:
        ValueError: rows or tokens don't divide evenly.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if rows % ways:
        raise ValueError(
            f"rows of a batch (={rows}) must be divisible by {ways}, the devices "
            f"along data and fsdp times `optim.accumulate` (={accumulate}); try "
            f"{-(-rows // ways) * ways}."
        )
    ways = mesh.shape["context"]
    if tokens % ways:
        raise ValueError(
            f"`data.token_budget` (={tokens}) must be divisible by `mesh.context` "
            f"(={ways}); try {-(-tokens // ways) * ways}."
        )
