"""How far long work is, on stderr: bars with rate and time left on a terminal, a line a phase in a log."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

LOG_SECONDS = 30.0
"""A phase that lasts says in a log how far it is, no more often than this."""
_SLOW_SECONDS = 1.0


class Bars:
    """One bar a phase, with steps, rate, time taken and time left.

    Where stderr is no terminal: one line as each phase ends, and one every LOG_SECONDS of a phase that lasts. `quiet`
    says nothing at all, warnings included; errors are not said here. `verbose` ends with what the phases took together.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, log_seconds: float = LOG_SECONDS) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._verbose = verbose
        self._began = time.monotonic()
        self._show: _Terminal | _Log = (
            _Terminal(self._console) if self._console.is_terminal else _Log(self._console, log_seconds)
        )

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show.close(stopped=kind is not None)
        if self._verbose:
            self._line(f"all phases: {duration(time.monotonic() - self._began)}")

    def phase(self, name: str, total: int) -> None:
        """A new phase of `total` steps begins."""
        self._show.phase(name, total)

    def advance(self, steps: int = 1) -> None:
        """`steps` more steps of the phase are done."""
        self._show.advance(steps)

    def warn(self, message: str) -> None:
        """A line of its own, above the bars."""
        self._line(f"packager: warning: {message}")

    def _line(self, text: str) -> None:
        _print(self._console, text)


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.3 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def rate(per_second: float) -> str:
    """Steps in a second, or the seconds of one step where it takes longer: "12.5/s", "4.0 s each"."""
    return f"{per_second:.1f}/s" if per_second >= 1 / _SLOW_SECONDS else f"{1 / per_second:.1f} s each"


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Terminal:
    """Bars that move."""

    def __init__(self, console: Console) -> None:
        name = TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis", min_width=16),
        )
        self._bars = Progress(name, BarColumn(bar_width=16), _Steps(), _Times(), console=console, expand=True)
        self._task: TaskID | None = None
        self._total = 1

    def phase(self, name: str, total: int) -> None:
        if self._task is None:
            self._bars.start()
        else:
            self._finish()
        # What has one step has no share to show: its bar pulses.
        self._total = max(1, total)
        self._task = self._bars.add_task(name, total=self._total if total > 1 else None)

    def advance(self, steps: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def close(self, *, stopped: bool) -> None:
        if self._task is not None:
            if not stopped:
                self._finish()
            self._bars.stop()

    def _finish(self) -> None:
        assert self._task is not None
        self._bars.update(self._task, total=self._total, completed=self._total)
        self._bars.stop_task(self._task)


class _Steps(ProgressColumn):
    """Done of all, and the rate; nothing of a phase of one step."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        if task.total is None or task.total <= 1:
            return Text("")
        speed = task.finished_speed or task.speed
        return Text(f"{task.completed:.0f}/{task.total:.0f}" + (f" {rate(speed)}" if speed else ""))


class _Times(ProgressColumn):
    """The time taken, then the time left."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        left = "" if task.finished or task.time_remaining is None else f", {duration(task.time_remaining)} left"
        return Text(duration(task.elapsed or 0) + left)


class _Log:
    """Lines: one as a phase ends, and of one that lasts how far it is. A thread of its own says so, for a single step
    may take minutes."""

    def __init__(self, console: Console, log_seconds: float) -> None:
        self._console, self._every = console, log_seconds
        self._name, self._total, self._done, self._began = "", 1, 0, 0.0
        self._ended: threading.Event | None = None
        self._ticker: threading.Thread | None = None

    def phase(self, name: str, total: int) -> None:
        self.close(stopped=False)
        self._name, self._total, self._done, self._began = name, max(1, total), 0, time.monotonic()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, args=(self._ended,), daemon=True)
        self._ticker.start()

    def advance(self, steps: int) -> None:
        self._done += steps

    def close(self, *, stopped: bool) -> None:
        if self._ended is None or self._ticker is None:
            return
        self._ended.set()
        self._ticker.join()
        self._ended = self._ticker = None
        taken = duration(time.monotonic() - self._began)
        _print(self._console, f"{self._name}: {'stopped after ' if stopped else ''}{taken}")

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(self._every):
            taken = time.monotonic() - self._began
            line = f"{self._name}: {duration(taken)} so far"
            if self._done and self._total > 1:
                line += (
                    f", {self._done / self._total:.0%} ({self._done}/{self._total}, {rate(self._done / taken)}, "
                    f"{duration(max(0.0, (self._total - self._done) * taken / self._done))} left)"
                )
            _print(self._console, line)
