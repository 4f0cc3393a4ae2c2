"""Progress: bars on a terminal, and lines in a log."""

import time
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

_EVERY = 30.0  # seconds from one line of a log to the next


class Bars(Progress):
    """Progress bars with ETA; where there is no terminal, a line now and then.

    Such a line is printed when a bar begins or does something else (its description),
    and every half minute.

    Args:
        more: text columns behind the others, as `TextColumn` takes them; a log is
            without them.
        show: whether anything is shown.
    """

    def __init__(self, *more: str, show: bool = True):
        console = Console(stderr=True, quiet=not show)
        columns = *Progress.get_default_columns(), MofNCompleteColumn(), *more
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._told: dict[TaskID, tuple[str, float]] = {}

    def add_task(self, description: str, **fields: Any) -> TaskID:
        """Adds a bar; see `Progress.add_task`."""
        task = super().add_task(description, **fields)
        self._tell(task)
        return task

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Changes a bar; see `Progress.update`."""
        super().update(task_id, **fields)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: int | float = 1) -> None:
        """Advances a bar; see `Progress.advance`."""
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if self.console.is_terminal:
            return
        task, now = self._tasks[task_id], time.monotonic()
        doing, last = self._told.get(task_id, ("", 0.0))
        if task.description == doing and now < last + _EVERY and not task.finished:
            return
        self._told[task_id] = task.description, now
        done = f" {task.completed:g}/{task.total:g}" if task.total else " …"
        self.console.print(f"{task.description}{done}", markup=False, highlight=False)
