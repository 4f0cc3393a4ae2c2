"""Profiler traces of a few steps of a training."""

import os
import re

import jax


class Trace:
    """Records a trace of some steps into a folder that TensorBoard and xprof read.

    Args:
        steps: FIRST:END, the first step that is recorded and the one before which the
            recording ends; "": none are.
        folder: where traces are written.

    Raises:
        ValueError: `steps` isn't written like that, or END isn't after FIRST.
    """

    def __init__(self, steps: str, folder: str | os.PathLike[str]):
        match = re.fullmatch(r"(\d+):(\d+)", steps or "0:0")
        self._first, self._end = map(int, match.groups()) if match else (1, 0)
        if self._end < self._first or (steps and self._end == self._first):
            raise ValueError(f"`profile_steps` (={steps!r}) must be like '10:13'.")
        self._folder, self._on = os.fspath(folder), False

    def __call__(self, step: int, result: object) -> None:
        """Begins or ends the recording, if it is time.

        Args:
            step: number of the step that comes next.
            result: of the step before, which must be ready when the recording ends.
        """
        if self._first <= step < self._end and not self._on:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and step >= self._end:
            self.close(result)

    def close(self, result: object) -> None:
        """Ends the recording if there is one."""
        if self._on:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._on = False
