"""The thread that owns the devices: takes jobs from the queue and makes their clips.

Between the steps of its rows, clips that are finished leave and waiting ones enter, the
oldest first. A younger one may pass an older one that finds no room, but never into the
row that is kept for it. What can't be packed is made by itself, in its turn.
"""

import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jvdit.data.clips import SIZE
from jvdit.generation.draft import passes
from jvdit.generation.request import Request
from jvdit.generation.results import GeneratedClip
from jvdit.generation.settings import Settings
from jvdit.machine.command import MISTAKES
from jvdit.machine.energy import Energy, Meter
from jvdit.serving.jobs import CLIP, POSTER, Jobs, VideoJob
from jvdit.serving.packed import Packed, PackedClip
from jvdit.serving.preview import Colours, webp
from jvdit.serving.served import Served

if TYPE_CHECKING:
    from jvdit.generation.provenance import Provenance

_IDLE = 5.0  # seconds between two looks at what has expired
_GLANCE = 0.5  # seconds between two previews of a clip
# Where each phase of a clip that is made by itself begins, and its share of the whole.
_SHARES = {"drafting": (0.0, 0.2), "denoising": (0.2, 0.7), "decoding": (0.9, 0.1)}


class Dropped(Exception):
    """The job that runs was cancelled, or the server stops."""


@dataclasses.dataclass
class PackedJob:
    """A job whose clip is packed.

    Attributes:
        job: the job.
        settings: complete.
        passes: of its clip, see `passes`.
        request: of the pass that comes next, or is made now.
        needs: tokens of that.
        clip: its place in a row; None: it waits for one.
        done: passes that are over.
        seen: when it was last looked at.
        energy: so far; None: none.
    """

    job: VideoJob
    settings: Settings
    passes: Generator[Request, GeneratedClip, GeneratedClip]
    request: Request
    needs: tuple[int, int]
    clip: PackedClip | None = None
    done: int = 0
    seen: float = 0.0
    energy: Energy | None = None

    def spend(self, energy: Energy) -> Energy:
        """Adds what it took; returns all so far."""
        self.energy = energy if self.energy is None else self.energy + energy
        return self.energy


class Worker(threading.Thread):
    """Makes the clips of jobs, one thread for all of them.

    Attributes:
        ready: set once all is compiled.
        same_bits: whether, on these devices, a clip's bits were the same wherever it
            lay in a row; None: that isn't known yet.

    Args:
        jobs: the queue.
        served: the model.
        packed: rows for many clips; None: each is made by itself.
        signed: signs the files; None: nothing does.
    """

    def __init__(
        self,
        jobs: Jobs,
        served: Served,
        packed: Packed | None = None,
        signed: "Provenance | None" = None,
    ):
        super().__init__(name="worker", daemon=True)
        self.jobs, self.served, self.packed = jobs, served, packed
        self.signed = signed
        self.ready = threading.Event()
        self.same_bits: bool | None = None
        self._entries: dict[str, PackedJob] = {}
        self._deadline: float | None = None  # when to leave what isn't finished
        self._writer = ThreadPoolExecutor(1, "writer")
        self._colours: Colours | None = None
        self._meter = Meter()

    def stop(self, grace: float) -> None:
        """Begins nothing more, and puts back what isn't finished in time.

        Args:
            grace: seconds that what runs may take.
        """
        with self.jobs.changed:
            self._deadline = time.monotonic() + grace
            self.jobs.changed.notify_all()
        if self.ident is not None:
            self.join()
        self._writer.shutdown()

    def run(self) -> None:
        """Works until `stop` is called."""
        try:
            self._warm_up()
            while self._goes_on():
                self.jobs.expire()
                for entry in [*self._entries.values()]:
                    if self.jobs.find(entry.job.id) is None:  # it was cancelled
                        self._take_out(entry)
                        self._entries.pop(entry.job.id, None)
                self._admit()
                if self._under_way():
                    self._step()
                    continue
                with self.jobs.changed:
                    if self._deadline is None and not self.jobs.waiting():
                        self.jobs.changed.wait(_IDLE)
                        self._meter.lap()  # belongs to no clip
        except Exception:  # the devices are lost: jobs wait for the next start
            traceback.print_exc(file=sys.stderr)
        for entry in self._entries.values():
            self.jobs.put_back(entry.job)

    def _warm_up(self) -> None:
        """Compiles what clips of the model's own size need."""
        if self.packed is not None and not self.packed.takes(self.packed.settings):
            self.packed = None
        if self.packed is not None:
            self.same_bits = self.packed.warm_up()
            generator = self.served.generator
            usual, codec, vae = Request(""), generator.codec, generator.model.vae
            frames, height, width = generator.complete(usual).size
            self._colours = Colours(codec.encode, height, width)
            for many in {frames, 1}:
                size = vae.latent_shape(many, height, width)
                codec.decode(np.zeros((1, *size, vae.latent_channels), np.float32))
        self.ready.set()

    def _goes_on(self) -> bool:
        return self._deadline is None or (
            time.monotonic() < self._deadline and self._under_way()
        )

    def _under_way(self) -> bool:
        """Whether a packed clip was begun."""
        return any(entry.clip or entry.done for entry in self._entries.values())

    def _take_out(self, entry: PackedJob) -> None:
        if entry.clip is not None and self.packed is not None:
            self.packed.leave(entry.clip)
            entry.clip = None

    def _admit(self) -> None:
        """Lets waiting clips into the rows, or makes one by itself."""
        closed: set[int] = set()
        for job in self._candidates():
            entry = self._entries.get(job.id)
            if entry is None and not self.guard(job, lambda j=job: self._prepare(j)):
                continue
            entry = self._entries.get(job.id)
            if entry is None or self.packed is None:  # it can't be packed
                if not closed:
                    self._alone(job)
                    return
                continue
            slot = self.packed.find(entry.needs, closed)
            if slot is not None:
                self.guard(job, lambda e=entry, s=slot: self._enter(e, s))
            elif not closed:
                closed.add(self.packed.soonest(entry.needs))

    def _candidates(self) -> Iterator[VideoJob]:
        """Jobs that want a place, the oldest first; at the end only those begun."""
        waiting = self.jobs.waiting() if self._deadline is None else []
        between = [x.job for x in self._entries.values() if x.clip is None and x.done]
        jobs = {job.id: job for job in (*between, *waiting)}
        yield from sorted(jobs.values(), key=lambda job: job.number)

    def _prepare(self, job: VideoJob) -> None:
        """Makes an entry of a job, if its clip can be packed."""
        request, settings = self._order(job)
        plain = self.served.maker(job.asked) is self.served.generator
        if self.packed is None or not plain or not self.packed.takes(settings):
            return
        if self.packed.find(self.packed.counts(request), taken=()) is None:
            return  # its sound is too long for a row
        steps = passes(request, bool(settings.draft), bool(settings.sound_after))
        first = next(steps)
        needs = self.packed.counts(first)
        self._entries[job.id] = PackedJob(job, settings, steps, first, needs)

    def _order(self, job: VideoJob) -> tuple[Request, Settings]:
        return self.served.order(job.asked, self.jobs.paths(job.id, job.files))

    def _enter(self, entry: PackedJob, slot: Any) -> None:
        assert self.packed is not None
        if not entry.done and not self.jobs.begin(entry.job):
            self._entries.pop(entry.job.id, None)
            return
        entry.clip = self.packed.enter(entry.request, entry.settings, slot)

    def _step(self) -> None:
        """Takes a step of all clips in the rows; finished ones leave."""
        assert self.packed is not None
        finished, spent = self.packed.step(), self._meter.lap()
        needs = [sum(x.needs) for x in self._entries.values() if x.clip]
        for entry in [*self._entries.values()]:
            if entry.clip is None:
                continue
            job = entry.job
            entry.spend(spent * (sum(entry.needs) / sum(needs)))
            if entry.clip in finished:
                self.guard(job, lambda e=entry: self._advance(e))
            else:
                self._look(entry, entry.clip)

    def _look(self, entry: PackedJob, clip: PackedClip) -> None:
        """Notes the progress of a clip, and what is to be seen of it."""
        many = entry.done + 1 + (entry.request.frames == 1 and not entry.done)
        share = clip.index / (clip.index + clip.left)
        self.jobs.progress(entry.job, (entry.done + share) / many)
        now = time.monotonic()
        if self.packed is None or self._colours is None or now < entry.seen + _GLANCE:
            return
        entry.seen = now
        frames = self._colours(self.packed.foreseen(clip))
        seconds = (entry.request.frames or 1) / (entry.request.fps or 8.0)
        picture = webp(frames, 1000 * seconds / len(frames))
        if self.jobs.find(entry.job.id) is not None:
            self.jobs.previews[entry.job.id] = picture

    def _advance(self, entry: PackedJob) -> None:
        """Decodes what a pass has made, and goes on to the next one."""
        assert self.packed is not None and entry.clip is not None
        try:
            latents = self.packed.latents(entry.clip)
        finally:
            self._take_out(entry)
        codec, unheard = self.served.generator.codec, lambda *_: None
        ((_, clip),) = codec.clips({0: latents}, [entry.request], unheard)
        try:
            entry.request = entry.passes.send(clip)
        except StopIteration as end:
            self._entries.pop(entry.job.id, None)
            self.finish(entry.job, end.value, entry.spend(self._meter.lap()))
            return
        entry.spend(self._meter.lap())
        entry.done += 1
        entry.needs = self.packed.counts(entry.request)

    def _alone(self, job: VideoJob) -> None:
        """Makes a clip by itself, from beginning to end."""

        def watch(doing: str, done: int, total: int) -> None:
            begun, share = _SHARES[doing]
            kept = self.jobs.progress(job, begun + done / total * share)
            late = self._deadline is not None and time.monotonic() >= self._deadline
            if not kept or late:
                raise Dropped

        def make() -> None:
            request, settings = self._order(job)
            clips = self.served.maker(job.asked).clips
            for _, clip in clips([request], settings, rows=1, watch=watch):
                self.finish(job, clip, self._meter.lap())

        self._meter.lap()
        if self.jobs.begin(job):
            self.guard(job, make)

    def guard(self, job: VideoJob, work: Callable[[], Any]) -> bool:
        """Does some work on a job, which fails if that does; whether it didn't."""
        try:
            work()
            return True
        except Dropped:
            self.jobs.put_back(job)
        except Exception as error:
            if entry := self._entries.pop(job.id, None):
                self._take_out(entry)
            mistake = isinstance(error, MISTAKES)
            if not mistake:
                traceback.print_exc(file=sys.stderr)
            told = str(error) if mistake else "the server made a mistake; see its log."
            self.jobs.fail(job, self.jobs.without_paths(job.id, told))
        return False

    def finish(self, job: VideoJob, clip: GeneratedClip, energy: Energy) -> None:
        """Writes a clip in another thread, and notes that it is there."""

        def save() -> None:
            jobs = self.jobs
            if jobs.find(job.id) is None:
                return
            job.told = job.told | {"energy": energy.told}
            about = {"prompt": job.asked.prompt, **job.told.get("settings", {})}
            about |= dict(zip(SIZE, clip.video.shape[:3], strict=True))
            about |= {"energy": energy.told}
            about |= {"lora": job.asked.lora} if job.asked.lora else {}
            given = map(tuple, jobs.paths(job.id, job.files).values())
            made, sign = (about, *given), None
            poster = webp([clip.video[len(clip.video) // 2]])
            if self.signed is not None:
                sign = self.signed.signing(*made)
                poster = self.signed.signed(poster, *made)
            jobs.path(job.id, POSTER).write_bytes(poster)
            scale = clip.viewing_scale
            clip.save(jobs.path(job.id, CLIP), {"jvdit": about}, scale, sign)
            jobs.complete(job)

        self._writer.submit(self.guard, job, save)
