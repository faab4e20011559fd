"""Children end with whoever started them, a signal is obeyed as Ctrl-C is, and peaks are told in bytes everywhere."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from packager.runtime import device_check, limits, processes, windows_jobs
from packager.runtime.limits import LimitedRun
from packager.runtime.processes import StoppedError, run_child, stopping
from packager.runtime.windows_jobs import Job

PARENT = """
import sys
sys.platform = sys.argv[1]
from packager.runtime.processes import run_child
child = "import os, subprocess, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(60)"
run_child([sys.executable, "-c", child, sys.argv[2]], timeout_seconds=60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see who is alive")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_child_dies_with_its_parent(tmp_path: Path, system: str, number: signal.Signals) -> None:
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, system, str(told)]) as parent:
        assert wait_until(lambda: told.is_file() and told.read_text(encoding="utf-8").strip())
        pid = int(told.read_text(encoding="utf-8"))
        assert alive(pid)
        parent.send_signal(number)
    assert wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize(
    ("code", "status", "out"),
    [
        ("print('é')", 0, "é\n"),
        ("raise SystemExit(3)", 3, ""),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", -int(signal.SIGKILL), ""),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", -int(signal.SIGSEGV), ""),
    ],
)
def test_how_a_child_ended_is_told_alike(
    monkeypatch: pytest.MonkeyPatch, system: str, code: str, status: int, out: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    done = run_child([sys.executable, "-X", "utf8", "-c", code], timeout_seconds=60)
    assert (done.returncode, done.stdout, done.timed_out) == (status, out, False)


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_child_that_takes_too_long_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    code = (
        "import subprocess, sys; grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(grandchild.pid, flush=True); grandchild.wait()"
    )
    done = run_child([sys.executable, "-c", code], timeout_seconds=2)
    assert (done.timed_out, done.returncode) == (True, processes.KILLED)
    assert wait_until(lambda: not alive(int(done.stdout)))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_obeyed_as_ctrl_c_is(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    tidied = []

    def work() -> None:
        with stopping():
            try:
                signal.raise_signal(number)
                pytest.fail("went on")
            finally:
                signal.raise_signal(number)  # another of the same end does not break off the tidying
                tidied.append(True)

    with pytest.raises(StoppedError) as caught:
        work()
    assert (caught.value.status, tidied) == (128 + number, [True])
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so_and_threads_change_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    found: list[Any] = []

    def elsewhere() -> None:
        with stopping():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


# Peaks


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **named: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)


def test_the_peak_is_that_of_proc_where_there_is_one() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    assert set(device_check.memory()) == {"peak_bytes", "anonymous_bytes", "mapped_bytes"}
    assert device_check.peak_bytes() == device_check.memory()["peak_bytes"] > 10 << 20


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("freebsd14", 1024), ("darwin", 1)])
def test_the_peak_is_in_bytes_on_every_system(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    import resource

    without_proc(monkeypatch)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=50_000))
    assert device_check.memory() == {"peak_bytes": 50_000 * unit}
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert device_check.peak_bytes() == 50_000 * unit


def test_windows_tells_the_peak_through_psutil_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proc(monkeypatch)
    monkeypatch.setattr(sys, "platform", "win32")
    process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=123_456))
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: process))
    assert device_check.memory() == {"peak_bytes": 123_456}
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert device_check.memory() == {}
    assert device_check.peak_bytes() is None


# Windows' job objects, with kernel32 played


class Kernel:
    """What is called of kernel32, and what it was told."""

    def __init__(self, *, makes: bool = True, sets: bool = True, admits: bool = True, peak: int = 0) -> None:
        self.makes, self.sets, self.admits, self.peak = makes, sets, admits, peak
        self.held: list[int] = []
        self.open = 0
        self.limits: Any = None

    def CreateJobObjectW(self, security: None, name: None) -> int:  # noqa: N802
        self.open += self.makes
        return 7 if self.makes else 0

    def SetInformationJobObject(self, job: int, kind: int, limits: Any, size: int) -> bool:  # noqa: N802
        found = limits._obj
        assert (job, kind, size) == (7, 9, ctypes.sizeof(found))
        self.limits = (found.Basic.LimitFlags, found.JobMemoryLimit)
        return self.sets

    def AssignProcessToJobObject(self, job: int, process: int) -> bool:  # noqa: N802
        self.held.append(process)
        return self.admits

    def QueryInformationJobObject(self, job: int, kind: int, limits: Any, size: int, none: None) -> bool:  # noqa: N802
        limits._obj.PeakJobMemoryUsed = self.peak
        return bool(self.peak)

    def CloseHandle(self, job: int) -> None:  # noqa: N802
        self.open -= 1


def test_a_job_ends_what_it_holds_and_limits_it() -> None:
    kernel = Kernel(peak=1000)
    job = Job(5 << 20, kernel)
    job.add(42)
    assert (kernel.limits, kernel.held, job.peak_bytes()) == ((0x2200, 5 << 20), [42], 1000)
    job.close()
    job.close()
    assert kernel.open == 0
    kernel = Kernel()
    assert Job(None, kernel).peak_bytes() is None
    assert kernel.limits == (0x2000, 0)
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        # As winnt.h lays it out for 64 bits.
        assert ctypes.sizeof(windows_jobs._ExtendedLimits) == 144


def test_a_job_that_is_refused_is_an_error_and_left_open_nowhere() -> None:
    for kernel in (Kernel(makes=False), Kernel(sets=False)):
        with pytest.raises(OSError, match="job object"):
            Job(1, kernel)
        assert kernel.open == 0
    with pytest.raises(OSError, match="no job object"):
        Job(None, Kernel(admits=False)).add(1)
    with pytest.raises(OSError, match="Windows'"):
        Job(None)


def test_under_a_job_a_run_that_failed_near_its_limit_was_ended_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for peak, killed in ((96, True), (50, False), (0, None)):
        monkeypatch.setattr(limits, "Job", lambda size, peak=peak: Job(size, Kernel(peak=peak)))
        with limits._job(100) as limit:
            assert (limit.name, limit.oom_killed()) == ("job object, on committed memory", killed)
            assert limit.charged_bytes() == (peak or None)
            done = LimitedRun(
                returncode=1,
                stdout="",
                stderr="",
                enforced=limit.name,
                timeout_seconds=None,
                last_phase="load",
                oom_killed=limit.oom_killed(),
            )
            assert done.killed_at_limit is (killed is True)
    monkeypatch.setattr(limits, "Job", Job)
    with limits._job(100) as limit:
        assert (limit.name, limit.prefix) == (None, ())


def test_groups_of_dead_processes_are_removed_by_the_next_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from packager.io.leftovers import owned; print(owned('packager-'))"
    mark = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f"{mark}x").mkdir()
    (tmp_path / f"packager-{os.getpid()}-x").mkdir()
    monkeypatch.setattr(limits, "_parents_v2", lambda: [tmp_path])
    monkeypatch.setattr(limits, "_parents_v1", list)
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    with limits._limited(1 << 30):
        pass
    assert not (tmp_path / f"{mark}x").exists()
    assert (tmp_path / f"packager-{os.getpid()}-x").exists()
