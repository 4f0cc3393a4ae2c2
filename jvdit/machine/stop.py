"""Asked to stop, by SIGTERM or Ctrl-C, a run saves what it has and ends."""

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
    """Within it SIGTERM is a KeyboardInterrupt, as Ctrl-C is; or noted, see `saving`.

    A second signal ends the process at once. Among several processes JAX itself takes
    SIGTERM, and they stop together where they `look`.

    Attributes:
        asked: whether to stop.
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
        """Within it a signal is noted, for there is something to save first.

        Args:
            saving: False: there isn't for a while, though it lies within.
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
        """For work that several processes do each for itself: SIGTERM ends one."""
        if self._alone:
            yield
            return
        # Python doesn't know JAX's handler, and so can't put it back.
        kept, libc = ctypes.create_string_buffer(_SIZE), ctypes.CDLL(None)
        libc.sigaction(signal.SIGTERM, None, kept)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            yield
        finally:
            libc.sigaction(signal.SIGTERM, kept, None)

    def look(self) -> bool:
        """Whether to stop; of several processes every one asks, equally often."""
        if not self._alone:
            self.asked = cluster.all_asked_to_stop() or self.asked
        return self.asked
