"""The device's own acceptance test, run here: in a fresh process, under a hard memory limit, its document typed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from packager.errors import ArtifactError
from packager.io.records import Said, from_plain
from packager.runtime import device_check
from packager.runtime.limits import LimitedRun, run_limited
from packager.validation.report import Check

PROMPT = "Name three things a small computer is good for."
_FINISHED = (0, 3)
"""Its own exit statuses: all checks passed, some failed. A runtime that crashes once it has answered has crashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMemory:
    """Bytes of the process with its context full: the most that was resident so far, and what is now, anonymous and
    mapped. None where the system does not say."""

    peak_bytes: int | None = None
    anonymous_bytes: int | None = None
    mapped_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How long loading took, and the speed of the longest prompt and of what follows, up to `context_tokens`."""

    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    context_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What the acceptance test prints."""

    passed: bool
    checks: tuple[Check, ...]
    memory: ProcessMemory
    speed: Speed
    prompt: Said
    answer: Said


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """One run of the acceptance test: its document, None where it did not finish, and how its process ended."""

    document: Document | None
    process: LimitedRun

    @property
    def peak_bytes(self) -> int | None:
        """The process's peak, None where it is not known."""
        return self.document.memory.peak_bytes if self.document else None


def run_acceptance(root: Path, budget_bytes: int | None, golden: Path | None = None) -> Acceptance:
    """Run the acceptance test on the bundle in `root`, under a limit where `budget_bytes` is given.

    The test that runs is this package's, not the file in the bundle: nothing in a bundle is executed here.
    """
    script = Path(device_check.__file__)
    extra = ["--no-report", *(["--golden", str(golden)] if golden else [])]
    # -P keeps this folder off sys.path, so that the child imports what a device's own script would.
    done = run_limited([sys.executable, "-P", str(script), str(root), "--prompt", PROMPT, *extra], budget_bytes)
    return Acceptance(document=_document(done.stdout) if done.returncode in _FINISHED else None, process=done)


def _document(printed: str) -> Document | None:
    try:
        return from_plain(Document, json.loads(printed), "the acceptance test")
    except (json.JSONDecodeError, ArtifactError):
        return None
