"""Windows' job objects: what is in one ends when the process that holds it ends, and takes no more memory than it may.

https://learn.microsoft.com/windows/win32/procthread/job-objects; the structures are those of winnt.h. Written without a
Windows at hand: until it has run there, take it for untried.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_EXTENDED_LIMITS = 9
_KILL_ON_CLOSE = 0x2000
_JOB_MEMORY = 0x200


class _BasicLimits(ctypes.Structure):
    _fields_ = [
        ("PerProcessUserTimeLimit", ctypes.c_int64),
        ("PerJobUserTimeLimit", ctypes.c_int64),
        ("LimitFlags", ctypes.c_uint32),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", ctypes.c_uint32),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", ctypes.c_uint32),
        ("SchedulingClass", ctypes.c_uint32),
    ]


class _ExtendedLimits(ctypes.Structure):
    _fields_ = [
        ("Basic", _BasicLimits),
        ("IoCounters", ctypes.c_uint64 * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    ]


class Job:
    """One job object, closed with `close`, or by the system when this process ends however it may.

    With `limit_bytes` what it holds may have at most that much memory committed, together: beyond, allocations fail.
    OSError where the system refuses.
    """

    def __init__(self, limit_bytes: int | None, kernel: Any = None) -> None:
        self._kernel = kernel or _kernel()
        self._handle = self._kernel.CreateJobObjectW(None, None)
        if not self._handle:
            raise OSError("Windows makes no job object")
        limits = _ExtendedLimits()
        limits.Basic.LimitFlags = _KILL_ON_CLOSE | (_JOB_MEMORY if limit_bytes is not None else 0)
        limits.JobMemoryLimit = limit_bytes or 0
        done = self._kernel.SetInformationJobObject(
            self._handle, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits)
        )
        if not done:
            self.close()
            raise OSError("Windows sets no limits on a job object")

    def add(self, process: int) -> None:
        """Put a process in, by its handle. OSError where that is refused."""
        if not self._kernel.AssignProcessToJobObject(self._handle, process):
            raise OSError("Windows lets the process into no job object")

    def peak_bytes(self) -> int | None:
        """The most memory that it had committed at once; None where the system does not tell."""
        limits = _ExtendedLimits()
        done = self._kernel.QueryInformationJobObject(
            self._handle, _EXTENDED_LIMITS, ctypes.byref(limits), ctypes.sizeof(limits), None
        )
        return int(limits.PeakJobMemoryUsed) if done else None

    def close(self) -> None:
        """End what is still in it, and give it back."""
        if self._handle:
            self._kernel.CloseHandle(self._handle)
            self._handle = None


def _kernel() -> Any:
    """kernel32 with the types of what is called: handles are pointers, which ctypes would cut to an int."""
    if sys.platform != "win32":
        raise OSError("job objects are Windows'")
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    handle, number, anything = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
    kernel.CreateJobObjectW.restype = handle
    kernel.CreateJobObjectW.argtypes = [anything, ctypes.c_wchar_p]
    kernel.SetInformationJobObject.argtypes = [handle, ctypes.c_int, anything, number]
    kernel.QueryInformationJobObject.argtypes = [handle, ctypes.c_int, anything, number, anything]
    kernel.AssignProcessToJobObject.argtypes = [handle, handle]
    kernel.CloseHandle.argtypes = [handle]
    return kernel
