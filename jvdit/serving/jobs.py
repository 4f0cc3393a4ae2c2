"""The jobs of a server: their queue, their states, and the folder that keeps them.

Each job has a folder of its own: `job.json`, what was uploaded for it, and its clip.
Files appear whole or not at all, so that a server that was killed goes on with what its
folder says: a job with a clip is completed, and all others wait again, in their order.
"""

import dataclasses
import os
import pathlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jvdit.machine.files import sweep_temporary, write_atomically
from jvdit.machine.json_files import read_json, write_json
from jvdit.serving.video_request import VideoRequest

CLIP, POSTER, _JOB = "clip.mp4", "poster.webp", "job.json"
WAITING, RUNNING, DONE, FAILED = "queued", "in_progress", "completed", "failed"


class Full(Exception):
    """The queue or the disk takes no more for now; the message says which."""


class VideoJob(msgspec.Struct):
    """One clip that was asked for.

    Attributes:
        id: its name, which nobody can guess.
        number: of its arrival; jobs are served in this order.
        asked: what was asked.
        files: names of the uploaded files in its folder, by the condition they are.
        created_at, completed_at: seconds since 1970.
        status: "queued", "in_progress", "completed" or "failed".
        progress: percent.
        error: why it failed, or "".
        told: what the API adds of a clip: size, length, settings, how to make it anew.
    """

    id: str
    number: int
    asked: VideoRequest
    files: dict[str, list[str]]
    created_at: float
    completed_at: float | None = None
    status: str = WAITING
    progress: int = 0
    error: str = ""
    told: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in (DONE, FAILED)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of what a server keeps.

    Attributes:
        waiting: most jobs that wait.
        kept: most jobs that are over, and still kept.
        num_bytes: most bytes of all jobs on the disk.
        seconds: how long a job that is over is kept.
    """

    waiting: int = 64
    kept: int = 1000
    num_bytes: int = 4 << 30
    seconds: float = 24 * 3600


class Jobs:
    """All jobs of a server. Its methods may be called from any thread.

    Attributes:
        changed: notified when a job is added or cancelled.
        previews: pictures (WebP) of clips that are emerging, by the id of their job.

    Args:
        folder: that keeps them; the caller holds its lock.
        limits: bounds.
    """

    def __init__(self, folder: pathlib.Path, limits: Limits = Limits()):  # noqa: B008
        self.folder, self.limits = folder, limits
        self.changed = threading.Condition(threading.RLock())
        self.previews: dict[str, bytes] = {}
        self._jobs: dict[str, VideoJob] = {}
        self._bytes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporary(folder)
        for job in sorted(self._kept(), key=lambda job: job.number):
            self._jobs[job.id] = job
            self._weigh(job)
        self._next = max((x.number for x in self._jobs.values()), default=0) + 1

    def _kept(self) -> Iterator[VideoJob]:
        """The jobs that an earlier server left in the folder."""
        for folder in self.folder.glob("video_*"):
            if not (file := folder / _JOB).exists():  # it never came to be a job
                shutil.rmtree(folder, ignore_errors=True)
                continue
            job = read_json(file, f"remove {folder}", VideoJob)
            if not job.over and (clip := folder / CLIP).exists():
                job.status, job.progress = DONE, 100
                job.completed_at = clip.stat().st_mtime
            elif not job.over:
                job.status, job.progress, job.completed_at = WAITING, 0, None
            yield job

    def receive(self, uploads: Mapping[str, Sequence[bytes]]) -> tuple[str, Any]:
        """Makes the folder of a job that is yet to be checked, with its files.

        Args:
            uploads: contents of uploaded files, by condition.

        Returns:
            The id of the job, and the names of its files by condition.

        Raises:
            Full: too many jobs wait, or the disk is full of jobs that do.
            OSError: the disk doesn't take it.
        """
        self.expire()
        id, files = f"video_{secrets.token_hex(12)}", {}
        self._check_room()
        try:
            for name, contents in uploads.items():
                files[name] = [f"{name}-{i}.upload" for i in range(len(contents))]
                for file, content in zip(files[name], contents, strict=True):
                    write_atomically(self.path(id, file), content)
        except OSError:
            self.discard(id)
            raise
        return id, files

    def discard(self, id: str) -> None:
        """Removes the folder of a job that isn't one."""
        shutil.rmtree(self.folder / id, ignore_errors=True)

    def add(
        self, id: str, files: dict[str, list[str]], asked: VideoRequest, told: Any
    ) -> VideoJob:
        """Puts a job at the end of the queue.

        Args:
            id: from `receive`.
            files: the same.
            asked: what was asked.
            told: see `VideoJob`.

        Raises:
            Full: as for `receive`.
            OSError: the disk doesn't take it.
        """
        with self.changed:
            self._check_room()
            job = VideoJob(id, self._next, asked, files, time.time(), told=told)
            self._store(job)
            self._next += 1
            self._jobs[id] = job
            self._weigh(job)
            self.changed.notify_all()
        return job

    def _check_room(self) -> None:
        if (waiting := len(self.waiting())) >= self.limits.waiting:
            raise Full(f"{waiting} jobs wait already; ask again later.")
        if self._heavy:
            raise Full("the disk space of this server is used up; ask again later.")

    def path(self, id: str, file: str) -> pathlib.Path:
        """Where a file of a job lies; both names are the server's own."""
        return self.folder / id / file

    def paths(self, id: str, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Paths of the uploaded files of a job, by condition."""
        return {
            name: [str(self.path(id, file)) for file in several]
            for name, several in files.items()
        }

    def without_paths(self, id: str, text: str) -> str:
        """A message in which files of a job go by their names alone."""
        return text.replace(f"{self.folder / id}{os.sep}", "")

    def find(self, id: str) -> VideoJob | None:
        """A job by its id; None: there is none, or no longer."""
        with self.changed:
            return self._jobs.get(id)

    def all(self) -> list[VideoJob]:
        """All jobs, the oldest first."""
        with self.changed:
            return [*self._jobs.values()]

    def waiting(self) -> list[VideoJob]:
        """The jobs that wait, the oldest first."""
        return [job for job in self.all() if job.status == WAITING]

    def begin(self, job: VideoJob) -> bool:
        """Notes that a job is worked on; False: it was cancelled meanwhile."""
        return self._update(job, status=RUNNING)

    def progress(self, job: VideoJob, share: float) -> bool:
        """Notes how much of a job is done; False: it was cancelled meanwhile."""
        with self.changed:
            job.progress = min(int(100 * share), 99)
            return job.id in self._jobs

    def put_back(self, job: VideoJob) -> None:
        """Has a job wait again, in its old place."""
        self._update(job, status=WAITING, progress=0)

    def complete(self, job: VideoJob) -> None:
        """Notes that the clip of a job lies in its folder."""
        self._update(job, status=DONE, progress=100, completed_at=time.time())

    def fail(self, job: VideoJob, error: str) -> None:
        """Notes why there is no clip."""
        now = time.time()
        self._update(job, status=FAILED, error=error, completed_at=now)

    def _update(self, job: VideoJob, **fields: Any) -> bool:
        with self.changed:
            for name, value in fields.items():
                setattr(job, name, value)
            if job.over:
                self.previews.pop(job.id, None)
            if job.id not in self._jobs:
                shutil.rmtree(self.folder / job.id, ignore_errors=True)
                return False
            self._store(job)
            self._weigh(job)
            return True

    def remove(self, id: str) -> bool:
        """Forgets a job, and removes its files; one that runs is cancelled."""
        with self.changed:
            if self._jobs.pop(id, None) is None:
                return False
            self._bytes.pop(id, None)
            self.previews.pop(id, None)
            shutil.rmtree(self.folder / id, ignore_errors=True)
            self.changed.notify_all()
            return True

    def expires_at(self, job: VideoJob) -> float | None:
        """When a job that is over is forgotten; None: it isn't over."""
        over = job.completed_at
        return None if over is None else over + self.limits.seconds

    def expire(self) -> None:
        """Forgets jobs that are long over, and the oldest of them if space is short."""
        with self.changed:
            over = [job for job in self._jobs.values() if job.over]
            over.sort(key=lambda job: job.completed_at or 0.0)
            now, many = time.time(), len(over) - self.limits.kept
            for i, job in enumerate(over):
                old = (self.expires_at(job) or now) <= now
                if not (old or self._heavy or i < many):
                    break
                self.remove(job.id)

    @property
    def _heavy(self) -> bool:
        with self.changed:
            return sum(self._bytes.values()) >= self.limits.num_bytes

    def _store(self, job: VideoJob) -> None:
        write_json(self.path(job.id, _JOB), msgspec.to_builtins(job))

    def _weigh(self, job: VideoJob) -> None:
        with os.scandir(self.folder / job.id) as files:
            self._bytes[job.id] = sum(file.stat().st_size for file in files)
