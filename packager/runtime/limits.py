"""A child process under a hard memory limit, where the system offers one.

cgroup v2, cgroup v1, or a systemd user scope, in this order, and on Windows a job object; without any the run is free
and the result says "not enforced". RLIMIT_AS is no substitute: address space is not memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packager.io.leftovers import abandoned, owned
from packager.runtime.processes import KILLED, run_child
from packager.runtime.windows_jobs import Job

_ROOT = Path("/sys/fs/cgroup")
_SWAPS = Path("/proc/swaps")
_KILLED = (KILLED, 128 - KILLED)
_PROBE_SECONDS = 10
_REMOVALS, _BETWEEN_REMOVALS_SECONDS = 20, 0.02
_V2, _V1, _SYSTEMD, _JOB = "cgroup v2", "cgroup v1", "systemd scope", "job object, on committed memory"
_GROUP = "packager-"
_NEARLY = 0.95
"""Of a job object's limit: a request that was refused is not counted."""
_SETTINGS = {
    _V2: ("memory.max", "memory.swap.max"),
    # The second includes what is swapped; kernels without swap accounting lack it.
    _V1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
}
_PEAK = {_V2: "memory.peak", _V1: "memory.max_usage_in_bytes"}
_KILLS = {_V2: "memory.events", _V1: "memory.oom_control"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedRun:
    """How a child ended. `enforced` names the mechanism, or is None; `last_phase` is the last it announced.

    `oom_killed`: whether the kernel ended a process of the child's for its limit, None where it does not say.
    `charged_bytes`: the most that the limit counted at once, pages of files among them; None where it does not say.
    """

    returncode: int
    stdout: str
    stderr: str
    enforced: str | None
    timeout_seconds: float | None
    last_phase: str
    oom_killed: bool | None = None
    charged_bytes: int | None = None

    @property
    def timed_out(self) -> bool:
        """Whether it was stopped for taking longer than `timeout_seconds`, which is None otherwise."""
        return self.timeout_seconds is not None

    @property
    def killed_at_limit(self) -> bool:
        """Whether the kernel ended the child for its memory: as its group says, or where none does, by the signal."""
        if self.enforced is None or self.timed_out:
            return False
        if self.enforced == _JOB:  # where memory is refused, not the process killed
            return self.returncode != 0 and self.oom_killed is True
        return self.returncode in _KILLED and self.oom_killed is not False

    @property
    def ending(self) -> str:
        """How it ended, for people, with the last phase it reached."""
        if self.timed_out:
            how = f"took longer than {self.timeout_seconds:.0f} s and was stopped (is the machine busy?)"
        elif self.killed_at_limit:
            how = f"was killed at the memory limit ({self.enforced})"
        elif self.returncode in _KILLED:
            how = "was killed from outside (SIGKILL; the system itself may be out of memory)"
        elif self.returncode < 0:
            how = f"crashed ({signal.Signals(-self.returncode).name})"
        else:
            how = f"ended with status {self.returncode}"
        return f"{how} in phase '{self.last_phase}'" + (f": {self.tail}" if self.tail else "")

    @property
    def tail(self) -> str:
        """The last line the child wrote to stderr that is not an announcement."""
        lines = [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("phase: ")]
        return lines[-1][:300] if lines else ""


def run_limited(command: Sequence[str], limit_bytes: int | None, *, timeout_seconds: float = 1800) -> LimitedRun:
    """Run `command` with at most `limit_bytes` of memory, swap included (None: no limit).

    The child announces its phases on stderr as "phase: NAME" lines.
    """
    with _limited(limit_bytes) as limit:
        done = run_child([*limit.prefix, *command], timeout_seconds=timeout_seconds, started=limit.take)
        oom_killed, charged = limit.oom_killed(), limit.charged_bytes()
    phases = [line.removeprefix("phase: ") for line in done.stderr.splitlines() if line.startswith("phase: ")]
    return LimitedRun(
        returncode=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        enforced=limit.name,
        timeout_seconds=timeout_seconds if done.timed_out else None,
        last_phase=phases[-1] if phases else "start",
        oom_killed=oom_killed,
        charged_bytes=charged,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limit:
    """What stands before a command to limit it, by which mechanism, and the control group, where it is one of ours; on
    Windows the job that the process is put in, with its limit."""

    prefix: tuple[str, ...] = ()
    mechanism: str | None = None
    group: Path | None = None
    swaps: bool = False
    job: Job | None = None
    job_bytes: int | None = None

    def take(self, process: subprocess.Popen[str]) -> None:
        """Put a process in the job, where there is one."""
        if self.job is not None:
            self.job.add(process._handle)  # type: ignore[attr-defined]  # Windows alone has it, and it is documented nowhere

    @property
    def name(self) -> str | None:
        """The mechanism, for people."""
        return f"{self.mechanism}, swap not limited" if self.swaps else self.mechanism

    def oom_killed(self) -> bool | None:
        """Whether the group's limit ended a process, or the job's was come near to; None where nothing says."""
        if self.job is not None and self.job_bytes is not None:
            used = self.job.peak_bytes()
            return None if used is None else used >= _NEARLY * self.job_bytes
        if self.group is None or self.mechanism is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            for line in (self.group / _KILLS[self.mechanism]).read_text(encoding="utf-8").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1]) > 0
        return None

    def charged_bytes(self) -> int | None:
        """The most memory that was charged to the group or the job."""
        if self.job is not None:
            return self.job.peak_bytes()
        if self.group is None or self.mechanism is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            return int((self.group / _PEAK[self.mechanism]).read_text(encoding="utf-8"))
        return None


@contextlib.contextmanager
def _limited(limit_bytes: int | None) -> Iterator[_Limit]:
    """The limit for one run; its group is removed afterwards."""
    if os.name == "nt":
        with _job(limit_bytes) as held:
            yield held
        return
    if limit_bytes is None:
        yield _Limit()
        return
    for mechanism, parents in ((_V2, _parents_v2()), (_V1, _parents_v1())):
        for parent in parents:
            for dead in abandoned(parent, _GROUP):
                _remove(dead)
            found = _make_group(parent, mechanism, limit_bytes)
            if found is not None:
                try:
                    yield found
                finally:
                    _remove(found.group)
                return
    scope = ("systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0")
    yield _Limit(prefix=scope, mechanism=_SYSTEMD) if _systemd_limits(scope, limit_bytes) else _Limit()


@contextlib.contextmanager
def _job(limit_bytes: int | None) -> Iterator[_Limit]:
    """The job object of one run, which ends what is in it; none where Windows refuses one."""
    try:
        job = Job(limit_bytes)
    except OSError:
        yield _Limit()
        return
    try:
        yield _Limit(job=job, job_bytes=limit_bytes, mechanism=_JOB if limit_bytes is not None else None)
    finally:
        job.close()


def _own_path(controller: str) -> str | None:
    """This process's group under `controller` ("" for v2), from /proc/self/cgroup."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return None


def _parents_v2() -> list[Path]:
    own = _own_path("")
    if own is None or not (_ROOT / "cgroup.controllers").is_file():
        return []
    return [_ROOT / own, (_ROOT / own).parent]


def _parents_v1() -> list[Path]:
    own = _own_path("memory")
    return [] if own is None else [_ROOT / "memory" / own]


def _make_group(parent: Path, mechanism: str, limit_bytes: int) -> _Limit | None:
    """A new group under `parent` that holds what enters it to the limit; None where the system does not let us."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=owned(_GROUP), dir=parent))
    except OSError:
        return None
    memory, swap = _SETTINGS[mechanism]
    swaps = False
    try:
        (folder / memory).write_text(str(limit_bytes), encoding="utf-8")
        try:
            (folder / swap).write_text("0" if mechanism == _V2 else str(limit_bytes), encoding="utf-8")
        except OSError:
            swaps = _has_swap()
        # The shell enters the group and becomes the command: nothing of this process runs between fork and exec.
        enter = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"))
        # A group may be made and limited, and still admit nobody.
        subprocess.run([*enter, "true"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        _remove(folder)
        return None
    except BaseException:  # a signal that asks this process to end
        _remove(folder)
        raise
    return _Limit(prefix=enter, mechanism=mechanism, group=folder, swaps=swaps)


def _remove(folder: Path | None) -> None:
    if folder is None:
        return
    # The kernel takes a moment to let go of a group whose processes it has ended.
    for _ in range(_REMOVALS):
        try:
            folder.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                return
        time.sleep(_BETWEEN_REMOVALS_SECONDS)


def _has_swap() -> bool:
    with contextlib.suppress(OSError):
        return len(_SWAPS.read_text(encoding="utf-8").splitlines()) > 1
    return False


def _systemd_limits(scope: Sequence[str], limit_bytes: int) -> bool:
    """Whether a scope is made and has the limit: without the memory controller systemd takes the setting and ignores
    it."""
    if shutil.which("systemd-run") is None:
        return False
    ask = ["sh", "-c", f'cat "{_ROOT}/$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"']
    try:
        done = subprocess.run(
            [*scope, *ask], capture_output=True, encoding="utf-8", check=False, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:  # no session bus answers
        return False
    # The kernel rounds down to whole pages.
    found = done.stdout.strip()
    return done.returncode == 0 and found.isdigit() and limit_bytes - (1 << 16) < int(found) <= limit_bytes
