"""The thread that owns the devices: takes jobs from the queue and makes their clips."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jvdit.generation.results import GeneratedClip
from jvdit.machine.command import MISTAKES
from jvdit.serving.jobs import CLIP, POSTER, Job, Jobs
from jvdit.serving.preview import webp
from jvdit.serving.served import Served

_IDLE = 5.0  # seconds between two looks at what has expired


class Dropped(Exception):
    """The job that runs was cancelled, or the server stops."""


class Worker(threading.Thread):
    """Makes the clips of jobs, one thread for all of them.

    Attributes:
        ready: set once all is compiled.

    Args:
        jobs: the queue.
        served: the model.
    """

    def __init__(self, jobs: Jobs, served: Served):
        super().__init__(name="worker", daemon=True)
        self.jobs, self.served = jobs, served
        self.ready = threading.Event()
        self._deadline: float | None = None  # when to leave what isn't finished
        self._writing: list[Future[None]] = []
        self._writer = ThreadPoolExecutor(1, "writer")

    def stop(self, grace: float) -> None:
        """Begins nothing more, and puts back what isn't finished in time.

        Args:
            grace: seconds that what runs may take.
        """
        with self.jobs.changed:
            self._deadline = time.monotonic() + grace
            self.jobs.changed.notify_all()
        self.join()
        self._writer.shutdown()

    def run(self) -> None:
        """Works until `stop` is called."""
        self.ready.set()
        while not self._stopping:
            self.jobs.expire()
            if waiting := self.jobs.waiting():
                self._alone(waiting[0])
                continue
            with self.jobs.changed:
                if not self._stopping and not self.jobs.waiting():
                    self.jobs.changed.wait(_IDLE)

    @property
    def _stopping(self) -> bool:
        return self._deadline is not None

    @property
    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _alone(self, job: Job) -> None:
        """Makes a clip by itself, from beginning to end."""

        def watch(doing: str, done: int, total: int) -> None:
            share = _SHARES[doing]
            kept = self.jobs.progress(job, share[0] + done / total * share[1])
            if not kept or self._out_of_time:
                raise Dropped

        def make() -> None:
            request, settings = self.served.order(
                job.asked, self.jobs.paths(job.id, job.files)
            )
            for _, clip in self.served.generator.clips(
                [request], settings, rows=1, watch=watch
            ):
                self.finish(job, clip)

        if self.jobs.begin(job):
            self.guard(job, make)

    def guard(self, job: Job, work: Callable[[], Any]) -> bool:
        """Does some work on a job, which fails if that does; whether it didn't."""
        try:
            work()
            return True
        except Dropped:
            self.jobs.put_back(job)
        except Exception as error:
            mistake = isinstance(error, MISTAKES)
            if not mistake:
                traceback.print_exc(file=sys.stderr)
            told = str(error) if mistake else "the server made a mistake; see its log."
            self.jobs.fail(job, told)
        return False

    def finish(self, job: Job, clip: GeneratedClip) -> None:
        """Writes a clip in another thread, and notes that it is there."""

        def write() -> None:
            def save() -> None:
                jobs = self.jobs
                if jobs.find(job.id) is None:
                    return
                poster = clip.video[len(clip.video) // 2]
                jobs.path(job.id, POSTER).write_bytes(webp([poster]))
                metadata = {"jvdit": job.told.get("settings", {})}
                path = jobs.path(job.id, CLIP)
                clip.save(path, metadata, clip.viewing_scale)
                jobs.complete(job)

            self.guard(job, save)

        self._writer.submit(write)


# Where each phase of making a clip begins, and its share of the whole.
_SHARES = {"drafting": (0.0, 0.2), "denoising": (0.2, 0.7), "decoding": (0.9, 0.1)}
