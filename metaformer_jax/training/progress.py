"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Without a terminal a line is printed this often, in seconds, so that logs stay short.
_SECONDS_PER_LINE = 10.0


class _StepsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} steps/s" if task.speed else "- steps/s")


class TrainingProgress:
    """Steps done, steps per second, remaining time, and the latest loss and accuracy.

    Args:
        console: where it is shown.
        total_steps: updates of the whole training.
        start_step: updates done before.
    """

    def __init__(self, console: Console, *, total_steps: int, start_step: int = 0):
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _StepsPerSecond(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", start=False, total=total_steps, completed=start_step, figures=""
        )
        self._total_steps = total_steps
        self._first_step: int | None = None

    def update(self, step: int, figures: str = "") -> None:
        """Shows that so many steps are done; new figures replace the old.

        The clock starts with the first call: the step before it includes compiling.
        """
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started, self._last_line = step, now, now
            self._bar.start_task(self._task)
        self._bar.update(self._task, completed=step)
        if figures:
            self._bar.update(self._task, figures=figures)
        if figures and not self._console.is_terminal and now - self._last_line > _SECONDS_PER_LINE:
            self._last_line = now
            speed = (step - self._first_step) / (now - self._started)
            remaining = (self._total_steps - step) / speed
            self._console.print(
                f"step {step}/{self._total_steps}  {speed:.1f} steps/s  "
                f"{remaining:.0f} s left  {figures}"
            )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
