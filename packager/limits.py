"""A child process under a hard memory limit, where the system offers one.

cgroup v2, cgroup v1, or a systemd user scope, in this order; without any the run is free and the result says "not
enforced". RLIMIT_AS is no substitute: address space is not memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedRun:
    """How a child ended. `enforced` names the mechanism, or is None; `last_phase` is the last it announced."""

    returncode: int
    stdout: str
    stderr: str
    enforced: str | None
    timed_out: bool
    last_phase: str

    @property
    def killed_at_limit(self) -> bool:
        """Whether the kernel ended the child for its memory: nobody else has a reason to."""
        return self.enforced is not None and not self.timed_out and self.returncode in _KILLED

    @property
    def ending(self) -> str:
        """How it ended, for people, with the last phase it reached."""
        if self.timed_out:
            how = "was stopped, it took too long,"
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
    timed_out = False
    with _group(limit_bytes) as (prefix, enter, mechanism):
        try:
            done = subprocess.run([*prefix, *command], capture_output=True, text=True, preexec_fn=enter, timeout=timeout_seconds, check=False)
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as expired:
            code, timed_out = -signal.SIGKILL, True
            out, err = (
                (stream or b"").decode(errors="replace") if isinstance(stream, bytes) else (stream or "") for stream in (expired.stdout, expired.stderr)
            )
    phases = [line.removeprefix("phase: ") for line in err.splitlines() if line.startswith("phase: ")]
    return LimitedRun(returncode=code, stdout=out, stderr=err, enforced=mechanism, timed_out=timed_out, last_phase=phases[-1] if phases else "start")


def peak_bytes() -> int | None:
    """The most resident memory this process has had so far (`VmHWM`); None where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def _group(limit_bytes: int | None) -> Iterator[tuple[list[str], Callable[[], None] | None, str | None]]:
    """(command prefix, what the child calls before it becomes the command, mechanism) for one limited run."""
    if limit_bytes is None:
        yield [], None, None
        return
    for make in (_cgroup_v2, _cgroup_v1):
        folder = make(limit_bytes)
        if folder is not None:
            try:
                yield [], _enterer(folder), {"_cgroup_v2": "cgroup v2", "_cgroup_v1": "cgroup v1"}[make.__name__]
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            return
    if _systemd_works():
        yield ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"], None, "systemd scope"
        return
    yield [], None, None


def _enterer(folder: Path) -> Callable[[], None]:
    def enter() -> None:
        (folder / "cgroup.procs").write_text(str(os.getpid()))

    return enter


def _own_path(controller: str) -> str | None:
    """This process's group under `controller` ("" for v2), from /proc/self/cgroup."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return None


def _cgroup_v2(limit_bytes: int) -> Path | None:
    own = _own_path("")
    if own is None or not (_ROOT / "cgroup.controllers").is_file():
        return None
    for parent in (_ROOT / own, (_ROOT / own).parent):
        folder = _make_group(parent, {"memory.max": str(limit_bytes), "memory.swap.max": "0"}, needed="memory.max")
        if folder is not None:
            return folder
    return None


def _cgroup_v1(limit_bytes: int) -> Path | None:
    own = _own_path("memory")
    if own is None:
        return None
    # The second file includes swap; kernels without swap accounting lack it.
    return _make_group(
        _ROOT / "memory" / own, {"memory.limit_in_bytes": str(limit_bytes), "memory.memsw.limit_in_bytes": str(limit_bytes)}, needed="memory.limit_in_bytes"
    )


def _make_group(parent: Path, settings: dict[str, str], *, needed: str) -> Path | None:
    try:
        folder = Path(tempfile.mkdtemp(prefix="packager-", dir=parent))
    except OSError:
        return None
    for name, value in settings.items():
        try:
            (folder / name).write_text(value)
        except OSError:
            if name == needed:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                return None
    try:
        # A group may be made and limited, and still admit nobody.
        subprocess.run(["true"], preexec_fn=_enterer(folder), check=True)
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    return folder


def _systemd_works() -> bool:
    if shutil.which("systemd-run") is None:
        return False
    probe = ["systemd-run", "--user", "--scope", "--quiet", "-p", "MemoryMax=1G", "true"]
    try:
        return subprocess.run(probe, capture_output=True, check=False, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:  # no session bus answers
        return False
