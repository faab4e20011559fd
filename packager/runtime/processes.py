"""Processes that end together: children die with this one however it ends, and a signal that asks it to end is obeyed
as Ctrl-C is, so that what is half-made is removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")
"""Those that ask a process to end; Windows knows only the first and the last, the others not the last."""
_TOGETHER_SECONDS = 1.0
KILLED = -int(getattr(signal, "SIGKILL", 9))
"""What ends a process without asking, as `subprocess` gives the status."""

# Linux ends a process with the one that started it when told to, which goes on through exec. Whoever started it may be
# gone before that is said.
_DYING_ALONG = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Elsewhere one process more stays between: it ends the command when the other end of a pipe is gone.
_WATCHING = """
import os, signal, subprocess, sys, threading
command = subprocess.Popen(sys.argv[2:])
def watch():
    os.read(int(sys.argv[1]), 1)
    command.kill()
threading.Thread(target=watch, daemon=True).start()
code = command.wait()
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class StoppedError(KeyboardInterrupt):
    """A signal asked this process to end. `status` is what it ought to return: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How a child ended: status as `subprocess` gives it, what it wrote, and whether it was stopped for its time."""

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Raise StoppedError in the block when a signal asks this process to end, which would else end it on the spot.

    Does nothing in threads but the main one, where Python lets nobody say what a signal does, and leaves signals alone
    that the process was told to ignore (nohup).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        # Two that come together mean one end: the second must not break off what the first one has removed. A later
        # one is obeyed, for an exception may get lost in somebody's callback.
        nonlocal first
        now = time.monotonic()
        if first and now - first < _TOGETHER_SECONDS:
            return
        first = now
        raise StoppedError(number)

    before = {}
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def run_child(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> Finished:
    """Run `command` to its end, or until its time is up; `started` is called with the process at once.

    It, and what it starts, ends with this process, on whatever way that ends. On Windows that is for `started` to see
    to (`packager.runtime.windows_jobs`).
    """
    with (
        _bound(command) as (bound, kept),
        subprocess.Popen(
            bound,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=kept,
            # A group of its own can be ended as a whole: the command may have started others.
            process_group=None if os.name == "nt" else 0,
        ) as process,
    ):
        timed_out = False
        try:
            started(process)
            try:
                out, err = process.communicate(timeout=timeout_seconds)
            except subprocess.TimeoutExpired:
                timed_out = True
                _end(process)
                out, err = process.communicate()
        except BaseException:
            _end(process)
            raise
    return Finished(returncode=KILLED if timed_out else process.returncode, stdout=out, stderr=err, timed_out=timed_out)


@contextlib.contextmanager
def _bound(command: Sequence[str]) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """The command line that runs `command` and ends with this process, and the file descriptors it needs."""
    # -I -S: nothing of the user's is imported by these few lines.
    python = [sys.executable, "-I", "-S", "-c"]
    if sys.platform == "linux":
        yield [*python, _DYING_ALONG, str(os.getpid()), *command], ()
    elif os.name == "nt":
        yield list(command), ()
    else:
        reading, writing = os.pipe()
        try:
            yield [*python, _WATCHING, str(reading), *command], (reading,)
        finally:
            os.close(reading)
            os.close(writing)


def _end(process: subprocess.Popen[str]) -> None:
    """End a child and what it started, without asking."""
    with contextlib.suppress(OSError):
        if sys.platform != "win32" and process.returncode is None:
            os.killpg(process.pid, -KILLED)
    process.kill()
