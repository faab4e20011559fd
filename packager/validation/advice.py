"""What to do about checks that failed: for each, what was measured against what limit, and the next command to type."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from packager.sizes import format_size
from packager.validation.report import Check, ValidationReport, shown

_BUILD = "packager build MAP --profile PROFILE -o BUNDLE --force"
_SCORE = "packager score MODEL -o MAP --force"
_ROOM = 1.02
"""Budget to ask for over a measured peak: two runs of the same bundle differ by less."""
_MIB = 1 << 20


def failures(checks: Iterable[Check]) -> list[str]:
    """One line for each check that failed: its name, what was measured, and the limit."""
    return [_failure(check) for check in checks if check.passed is False]


def advice(checks: Iterable[Check]) -> list[str]:
    """What to do next about the checks that failed, each thing said once. Names in capitals stand for your own."""
    return list(dict.fromkeys(_next_step(check) for check in checks if check.passed is False))


def verdict_lines(report: ValidationReport) -> list[str]:
    """The verdict; of a bundle that is not valid also each cause, and each next step once."""
    if report.passed:
        return ["VALID"]
    failed = failures(report.checks)
    return [
        f"NOT VALID: {len(failed)} of {len(report.checks)} checks failed",
        *(f"cause: {line}" for line in failed),
        *(f"next: {line}" for line in advice(report.checks)),
    ]


def columns(check: Check) -> tuple[str, str]:
    """What a check measured and what it is held against, with the unit where it is said once. Bytes are exact where
    they would read alike."""
    both = [shown(item, check.unit) for item in (check.value, check.limit)]
    if both[0] == both[1] and check.value != check.limit and check.unit == "bytes":
        both = [f"{item:,} bytes" if isinstance(item, int) else str(item) for item in (check.value, check.limit)]
    unit = "" if check.unit == "bytes" or isinstance(check.value, str) else f" {check.unit}"
    return both[0] + unit, both[1]


def size_or_dash(size: int | None) -> str:
    """Bytes as people write them, or a dash where they are not known."""
    return "–" if size is None else format_size(size)


def _failure(check: Check) -> str:
    if check.unit == "bytes" and isinstance(check.value, int) and isinstance(check.limit, int):
        over = format_size(check.value - check.limit) if check.value > check.limit else ""
        return f"{check.name}: {format_size(check.value)}, the limit is {format_size(check.limit)}" + (
            f" ({over} over)" if over else ""
        )
    limit = "" if check.limit is None else f", the limit is {shown(check.limit, check.unit)}"
    unit = f" ({check.unit})" if check.unit else ""
    return f"{check.name}: {shown(check.value, check.unit)}{limit}{unit}"


def _next_step(check: Check) -> str:
    for beginning, step in _STEPS.items():
        if check.name.startswith(beginning):
            return step(check)
    return f"build it again: {_BUILD}; if this stays, report it with the bundle's report.json"


def _memory(check: Check) -> str:
    """With a measured peak the budget that holds it, rounded up to whole MiB."""
    if not isinstance(check.value, int):
        return f"let the packager measure and plan again: {_BUILD}; or give it more memory: --budget SIZE"
    wanted = -(-int(check.value * _ROOM) // _MIB)
    return (
        f"let the packager measure and plan again within the same budget: {_BUILD}; or, if the device has it, give the "
        f"process more: {_BUILD} --budget {wanted}MiB"
    )


def _acceptance(check: Check) -> str:
    if "memory limit" in str(check.value):
        return _memory(check)
    return (
        "see the runtime's own messages: python BUNDLE/check.py (the bundle's packager.json names the versions that it "
        f"was made with); then build it again: {_BUILD}"
    )


def _said(step: str) -> Callable[[Check], str]:
    return lambda _: step


_TOKENIZER = _said(
    f"take the tokenizer from the model again: {_SCORE}, then {_BUILD}; if this stays, the runtime does not do what "
    "this tokenizer does: report it with the model's name"
)
_GOLDEN = _said(
    f"build it again: {_BUILD}; if this stays, the runtime computes otherwise than PyTorch on this machine: report it "
    "with the bundle's report.json"
)
_STEPS: dict[str, Callable[[Check], str]] = {
    "files whose size or SHA-256": _said(f"a file was altered or damaged, build it again: {_BUILD}"),
    "texts that the tokenizer": _TOKENIZER,
    "stop tokens that do not stop": _said(f"take the stop tokens from the model again: {_SCORE}, then {_BUILD}"),
    "what keeps the chat template": _said(
        "correct the chat_template of the model, which is beside its tokenizer, and take it from there again: "
        f"{_SCORE}, then {_BUILD}"
    ),
    "KL divergence of the next-token": _GOLDEN,
    "prompts whose greedy tokens": _GOLDEN,
    "largest logit difference": _GOLDEN,
    "divergence at the end of a full context": _said(
        f"let the score find out how long prompts must be read: {_SCORE}, then {_BUILD}; or build for shorter prompts: "
        f"{_BUILD} --context TOKENS"
    ),
    "peak resident memory": _memory,
    "acceptance test on ONNX Runtime GenAI": _acceptance,
    "rise of the loss over the source": _said(
        f"the weights lose more than the map predicted, or are another model's; score the model again: {_SCORE}, then "
        f"{_BUILD}"
    ),
    "loss that ONNX Runtime adds": _said(
        f"keep more in float: {_BUILD} --kv-cache float; or set accuracy_level = 1 (no 8-bit inputs) in a profile of "
        "your own"
    ),
}
"""How a check's name begins → what to do."""
