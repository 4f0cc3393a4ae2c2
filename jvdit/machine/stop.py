"""Stop requests: on SIGTERM or Ctrl-C, a run saves what it has and ends."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jvdit.machine import cluster

_SIZE = 1024  # bytes, more than any system's `struct sigaction` takes


class StopRequest:
    """A context in which SIGTERM and Ctrl-C ask a run to stop.

    Either raises a KeyboardInterrupt, or inside `saving` is only noted in `asked`. A
    second signal ends the process at once. In a run of several processes JAX itself
    handles SIGTERM, and all stop together where they call `look`.

    Attributes:
        asked: whether the run was asked to stop.
    """

    def __init__(self):
        self.asked, self._alone = False, jax.process_count() == 1
        self._saving = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if self._alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        if not self._saving:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def saving(self, saving: bool = True) -> Iterator[None]:
        """A context in which a signal is only noted, so that the run can save first.

        Args:
            saving: False raises a KeyboardInterrupt again, for an interruptible part
                inside such a context.
        """
        before, self._saving = self._saving, saving
        try:
            if not saving and self.asked and self._alone:
                raise KeyboardInterrupt
            yield
        finally:
            self._saving = before

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A context for work without collectives, where SIGTERM ends each process."""
        if self._alone:
            yield
            return
        # Python doesn't know JAX's handler, so it can't restore it by itself.
        kept, libc = ctypes.create_string_buffer(_SIZE), ctypes.CDLL(None)
        libc.sigaction(signal.SIGTERM, None, kept)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            yield
        finally:
            libc.sigaction(signal.SIGTERM, kept, None)

    def look(self) -> bool:
        """Whether to stop; every process of a run must call this equally often."""
        if not self._alone:
            self.asked = cluster.all_asked_to_stop() or self.asked
        return self.asked
