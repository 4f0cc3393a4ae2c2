"""The batches of a builder, in order and made ahead of time.

`Batches` iterates over a builder with grain's threads or processes, with prefetching
and a watchdog. Its state is one integer.
"""

import dataclasses
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from typing import Any

import grain

from jvdit.data.builders import Arrays, ClipBatches, call_within, few
from jvdit.data.packed_batches import PackedBatches

_MOST_PREFETCHED = 64  # batches
_KEPT_REPORTS = 1000
# What grain says of a worker that died of SIGBUS: a page of shared memory that is full.
_BUS_ERROR, _SHARED = "exit code -7", "/dev/shm"
_TOO_FEW = 200  # clips to judge a data set by


class BadDataError(ValueError):
    """A data set of which too much cannot be read."""


@dataclasses.dataclass(eq=False, repr=False)
class Batches:
    """The batches of a builder in the order of steps, made ahead of time.

        with Batches(builder, start=restored_step) as batches:
            for batch in batches:
                ...

    Args:
        builder: makes the batch of a step.
        start: first step.
        num_threads: batches that are made at once (in each process).
        buffer_bytes: most bytes of batches that are made ahead; but never fewer than 2
            batches, nor more than 64.
        num_workers: processes; 0: threads of this one. A worker imports the main module
            again, so that must do nothing when imported.
        timeout: seconds to wait for a batch. None: twice that of the builder, so that a
            reading which hangs is named by its clips.
        max_bad: share of clips that may be unreadable.

    Attributes:
        clips: number of clips in the batches returned so far, bad ones included.
        bad: number of clips that could not be read, in the batches returned so far.
        reports: (step, clip id, reason) of the latest of those.
        fingerprint: of the plan; a step means nothing without it.
    """

    builder: PackedBatches | ClipBatches
    _: dataclasses.KW_ONLY
    start: dataclasses.InitVar[int] = 0
    num_threads: int | None = None
    buffer_bytes: int = 1 << 30
    num_workers: int = 0
    timeout: float | None = None
    max_bad: float = 1.0

    def __post_init__(self, start: int):
        most = self.buffer_bytes // self.builder.nbytes
        self.prefetched = max(2, min(_MOST_PREFETCHED, most))
        self.clips = self.bad = 0
        self.reports: deque[tuple[int, int, str]] = deque(maxlen=_KEPT_REPORTS)
        self.fingerprint = self.builder.plan.fingerprint
        self._batches: Any = None
        self._step = start

    @property
    def step(self) -> int:
        """Step of the next batch; the whole state. Setting it goes there."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self.close()
        self._step = step

    def _iterate(self) -> Any:
        source: Any = self.builder
        dataset = grain.MapDataset.source(source)[self._step :]
        # The default would keep 500 batches, whatever their size.
        each = max(1, self.prefetched // max(1, self.num_workers))
        threads = self.num_threads or min(16, os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=each)
        iterator = dataset.to_iter_dataset(options)
        if self.num_workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # grain reads flags of its own
                flags.FLAGS.mark_as_parsed()
            how = {"num_workers": self.num_workers, "per_worker_buffer_size": 1}
            iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(**how))
        return iter(iterator)

    def __iter__(self) -> Iterator[Arrays]:
        return self

    def __next__(self) -> Arrays:
        """Returns the next batch.

        Raises:
            StalledError: it does not arrive; it names the step and its clips.
            BadDataError: too many clips could not be read.
            OSError: worker processes ran out of shared memory.
        """
        if self._batches is None:
            self._batches = self._iterate()
        try:
            timeout = self.timeout or 2 * self.builder.timeout
            batch, bad = call_within(timeout, self._awaited, next, self._batches)
        except BaseException as error:
            self.close()
            if _BUS_ERROR in str(error):
                raise OSError(self._short_of_shared_memory()) from error
            raise
        self.bad += len(bad)
        self.clips += int((batch["clip_id"] >= 0).sum())
        self.reports.extend((self._step, clip, reason) for clip, reason in bad)
        if self.clips >= _TOO_FEW and self.bad > self.max_bad * self.clips:
            latest = [f"{clip}: {reason}" for _, clip, reason in self.reports]
            raise BadDataError(
                f"{self.bad} of {self.clips} clips could not be read, more than the "
                f"share of {self.max_bad:g} that `max_bad` allows; the latest: "
                f"{'; '.join(latest[-3:])}. Mend the data set, or raise `max_bad`."
            )
        self._step += 1
        return batch

    def _short_of_shared_memory(self) -> str:
        each = self.builder.nbytes / 1e6
        # A batch that is handed over, one that waits, and one that is made.
        wanted = 3 * self.num_workers * each
        return (
            f"a worker process ran out of shared memory: {_SHARED} has "
            f"{shutil.disk_usage(_SHARED).total / 1e6:.0f} MB, and {self.num_workers} "
            f"`data.workers` pass batches of {each:.0f} MB through it. Make it larger, "
            f"in docker by --shm-size={max(64, math.ceil(wanted))}m, or have fewer "
            "workers; with 0 of them threads make the batches."
        )

    def _awaited(self) -> str:
        """Says what the next batch is made of."""
        ids = [self.builder.clip_id(x) for x in self.builder.slots(self._step)]
        workers = f"{self.num_workers or 'no'} worker processes"
        return f"The batch of step {self._step} of clips {few(ids)}, made by {workers},"

    def close(self) -> None:
        """Ends threads and processes. Iterating again starts them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
