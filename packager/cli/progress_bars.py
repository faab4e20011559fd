"""Progress bars on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """One bar a phase, with the time it took. Where stderr is no terminal, one line as each phase begins."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console)
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and self._console.is_terminal:
            self._bars.stop()

    def phase(self, name: str, total: int) -> None:
        """A new phase of `total` steps begins."""
        if not self._console.is_terminal:
            self._console.print(f"{name} …", highlight=False)
        elif self._task is None:
            self._bars.start()
        if self._task is not None:
            self._bars.stop_task(self._task)
        self._task = self._bars.add_task(name, total=total)

    def advance(self, steps: int = 1) -> None:
        """`steps` more steps of the phase are done."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def warn(self, message: str) -> None:
        """A line of its own, above the bars."""
        self._console.print(f"packager: warning: {message}", highlight=False, markup=False, soft_wrap=True)
