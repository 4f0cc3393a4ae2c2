"""Where scalars and images of a run are logged: TensorBoard, or Weights & Biases."""

import contextlib
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

_FLUSHED_WITHIN = 60  # seconds


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """A package isn't found: tensorboardX has no need of torch, which takes seconds."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


class TensorBoard:
    """A TensorBoard event file, written from the calling thread.

    tensorboardX's own writer uses a thread that dies silently when the disk is full,
    after which its queue blocks for ever.
    """

    def __init__(self, workdir: str):
        with _without("torch"):
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

        folder = os.path.join(workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        messages: Any = event_pb2  # made when imported
        self._summary, self._event = summary, messages.Event
        self._flushed = time.monotonic()

    def scalar(self, step: int, name: str, value: float) -> None:
        """Logs a number."""
        self._write(step, self._summary.scalar(name, value))

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Logs a picture, uint8 [h w 3]."""
        self._write(step, self._summary.image(name, pixels, dataformats="HWC"))

    def _write(self, step: int, made: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=made)
        self._writer.write_event(event)
        if time.monotonic() > self._flushed + _FLUSHED_WITHIN:
            self.flush()

    def flush(self) -> None:
        """Makes what was logged visible."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; one that was stopped goes on under its id."""

    def __init__(self, workdir: str):
        try:
            self._wandb = importlib.import_module("wandb")
        except ModuleNotFoundError:
            raise ValueError(
                "`logger` 'wandb' needs the package: pip install wandb; or take "
                "'tensorboard'."
            ) from None
        file = pathlib.Path(workdir) / "wandb_id"
        known = file.read_text().strip() if file.exists() else None
        name = pathlib.Path(workdir).absolute().name
        self._run = self._wandb.init(
            project="jvdit", name=name, dir=workdir, id=known, resume="allow"
        )
        file.write_text(self._run.id)

    def scalar(self, step: int, name: str, value: float) -> None:
        """Logs a number."""
        self._run.log({name: value}, step=step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Logs a picture, uint8 [h w 3]."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def flush(self) -> None:
        """Its own process sends what was logged."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def logger_named(name: str) -> type[TensorBoard] | type[WandB]:
    """The class of a name in `LOGGERS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in LOGGERS:
        raise ValueError(f"`logger` (={name!r}) must be one of: {', '.join(LOGGERS)}.")
    return LOGGERS[name]
