"""Work in child processes that may crash or hang, its results in order.

A decoder is native code that is fed what strangers made. Each worker is a process
of its own with a deadline for its next result; one that dies or hangs costs the item
it had, and is replaced. If it was killed from outside, as a rule for want of memory,
the item is tried once more, while no other is worked on. Workers die with the process
that started them, however it ends, and leave no core files.
"""

import collections
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection
from typing import Any

_READY, _RESULT, _END, _ERROR = "ready", "result", "end", "error"
_START_SECONDS = 300.0  # to import the libraries, on a busy machine
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BUFFERED = 32  # results of one item that may wait for the items before it
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that came of an item.

    Attributes:
        item: the item.
        kind: "result" (any number of them), and then once "end", "error" (the work
            raised; value: the traceback), "crash" (value: how the process ended) or
            "timeout" (value: the seconds).
        value: see `kind`.
    """

    item: Any
    kind: str
    value: Any = None


@dataclasses.dataclass(frozen=True)
class _Task:
    """An item and its place; how many of its results are known from a first try."""

    number: int
    item: Any
    known: int = 0
    again: bool = False


def supervise(
    work: Callable[[Any], Iterable[Any]],
    items: Iterable[Any],
    *,
    workers: int,
    timeout: float | int,
) -> Generator[Event, None, None]:
    """Runs `work` on items in parallel; yields the events of each, in their order.

    Args:
        work: function of a module (it is pickled by name) that yields the results of an
            item.
        items: the items; pickled, and taken as needed.
        workers: number of processes.
        timeout: seconds that a worker may take for each next result.

    Raises:
        RuntimeError: the workers cannot be started at all.
    """
    pool = [_Worker(work) for _ in range(max(1, workers))]
    queue = enumerate(items)
    waiting: dict[int, collections.deque[Event]] = {}
    again: collections.deque[_Task] = collections.deque()
    head = 0  # the item whose events are being yielded
    exhausted = False
    try:
        while True:
            exhausted |= _hand_out(pool, queue, waiting, again, timeout)
            while waiting.get(head):
                event = waiting[head].popleft()
                yield event
                if event.kind != _RESULT:
                    del waiting[head]
                    head += 1
            if exhausted and not waiting:
                return
            _collect(pool, waiting, again, head, work, timeout)
    finally:
        for worker in pool:
            worker.kill()


def _hand_out(pool, queue, waiting, again, timeout) -> bool:
    """Gives idle workers what is to be done; returns whether no item is left."""
    ahead = 4 * len(pool)  # bounds what waits for a slow item
    for worker in pool:
        busy = [w.task for w in pool if w.task]
        if worker.task or not worker.ready or any(task.again for task in busy):
            continue
        if again:  # those wait until they are alone, and nothing else is begun
            if not busy:
                worker.give(again.popleft(), timeout)
        elif len(waiting) < ahead:
            if (entry := next(queue, None)) is None:
                return True
            waiting[entry[0]] = collections.deque()
            worker.give(_Task(*entry), timeout)
    return False


def _collect(pool, waiting, again, head, work, timeout) -> None:
    """Waits for messages, deaths and deadlines, and puts them into `waiting`."""
    # A worker far ahead of the head is left unread: its pipe fills and it waits. But
    # none may wait for an item that waits for all of them to end.
    heard = [
        w
        for w in pool
        if again
        or w.task is None
        or w.task.number == head
        or len(waiting[w.task.number]) < _BUFFERED
    ]
    for worker in pool:
        if worker not in heard:
            worker.deadline = time.monotonic() + timeout
    patience = min(w.deadline for w in heard) - time.monotonic()
    ready = connection.wait([w.pipe for w in heard], max(0.0, min(patience, 1.0)))
    for k, worker in enumerate(pool):
        task, event = worker.task, None
        if worker.pipe in ready:
            event = worker.receive(timeout)
        elif worker in heard and time.monotonic() > worker.deadline:
            event = worker.expire(timeout)
        if event is None:
            continue
        killed = event.kind == "crash" and worker.process.exitcode in _FROM_OUTSIDE
        if task and killed and not task.again:
            again.append(dataclasses.replace(task, known=worker.came, again=True))
        elif task:
            waiting[task.number].append(event)
        if event.kind in ("crash", "timeout"):
            worker.kill()
            pool[k] = _Worker(work)


class _Worker:
    """A child process, the pipe to it, and what it is doing."""

    def __init__(self, work: Callable[[Any], Iterable[Any]]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        serving = theirs, work, os.getpid()
        self.process = context.Process(target=_serve, args=serving, daemon=True)
        with _without_interruption():
            self.process.start()
        theirs.close()
        self.ready, self.task, self.came = False, None, 0
        self.deadline = time.monotonic() + _START_SECONDS

    def give(self, task: _Task, timeout: float | int) -> None:
        """Sends an item to work on."""
        self.task, self.came = task, 0
        self.deadline = time.monotonic() + timeout
        with contextlib.suppress(OSError):  # it died idle; `receive` sees that
            self.pipe.send(task.item)

    def receive(self, timeout: float | int) -> Event | None:
        """Returns what came through the pipe, if it is something new."""
        item = self.task.item if self.task else None
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            how = _ending(self.process.exitcode)
            if not self.ready:
                raise RuntimeError(f"A worker could not start: {how}.") from None
            if self.task and self.task.again:
                how += ", as before"
            return Event(item, "crash", how)
        if kind == _READY:
            self.ready, self.deadline = True, float("inf")
            return None
        assert self.task is not None, "a worker says nothing unasked"
        known, self.deadline = self.task.known, time.monotonic() + timeout
        if kind != _RESULT:
            self.task, self.deadline = None, float("inf")
            return Event(item, kind, value)
        self.came += 1
        return Event(item, kind, value) if self.came > known else None

    def expire(self, timeout: float | int) -> Event:
        """Returns the event of a deadline that has passed."""
        if self.task is None:
            raise RuntimeError(f"A worker did not start within {_START_SECONDS} s.")
        return Event(self.task.item, "timeout", f"{timeout:g} s")

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """Lets Ctrl-C wait until a child has what it begins with; the child never sees it.

    A mask alone isn't enough: another thread of this process, of a library, may take
    the signal, and Python then interrupts the main thread all the same. The mask is
    what the child inherits.
    """
    came: list[tuple[int, Any]] = []
    main = threading.current_thread() is threading.main_thread()
    if main:
        handler = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if came and callable(handler):
        handler(*came[0])


def _ending(code: int | None) -> str:
    """Says how a process ended."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def _serve(pipe, work: Callable[[Any], Iterable[Any]], parent: int) -> None:
    """Works on items until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            return
    pipe.send((_READY, None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            for result in work(item):
                pipe.send((_RESULT, result))
            pipe.send((_END, None))
        except Exception:
            pipe.send((_ERROR, traceback.format_exc(limit=-4)))
