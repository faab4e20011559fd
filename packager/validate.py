"""Validation: does the bundle, on the target runtime, do what was promised?

The device's own acceptance test runs in a fresh process under a hard memory limit equal to the budget; held-out loss
is measured on the runtime and in torch with the same weights. A failed check is a row of the report.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.bundle import GOLDEN_FILE
from packager.errors import RuntimeCheckError
from packager.limits import LimitedRun, run_limited
from packager.progress import Progress
from packager.report import Check, ValidationReport

if TYPE_CHECKING:
    from packager.reference import Reference

PROMPT = "Name three things a small computer is good for."
_RUNTIME_LOSS_LIMIT = 0.05


def measure_device(root: Path, budget_bytes: int | None, golden: Path | None = None) -> tuple[dict[str, Any] | None, LimitedRun]:
    """Run the acceptance test on the bundle in `root` under a limit. None when it did not finish.

    The test that runs is this package's, not the file in the bundle: nothing in a bundle is executed here.
    """
    script = Path(__file__).with_name("device_check.py")
    extra = ["--golden", str(golden)] if golden else []
    done = run_limited([sys.executable, "-I", str(script), str(root), "--prompt", PROMPT, *extra], budget_bytes)
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return None, done
    return document, done


def validate_bundle(
    root: Path, manifest: dict[str, Any], *, progress: Progress, rounds: Sequence[dict[str, Any]] = (), torch_side: Reference | None = None
) -> ValidationReport:
    """Check the bundle in `root`. It needs no map and no source model.

    `torch_side` is its reference where that was loaded already; a golden file is made for the occasion where the
    bundle has none.
    """
    from packager import reference, runtime
    from packager.losses import mean_loss

    budget = int(manifest["bounds"]["budget_bytes"])
    progress.phase("torch reference of the same weights", 2)
    torch_side = torch_side or reference.load_reference(root, manifest)
    with tempfile.TemporaryDirectory() as scratch:
        golden = root / GOLDEN_FILE
        if not golden.is_file():
            golden = Path(scratch) / GOLDEN_FILE
            reference.write_golden(torch_side, golden, context_tokens=int(manifest["bounds"]["context_tokens"]))
        progress.advance()
        torch_loss = mean_loss(torch_side.model, torch_side.heldout)
        windows = torch_side.heldout.numpy()
        del torch_side
        progress.advance()
        progress.phase("held-out loss on the runtime", len(windows))
        runtime_loss = runtime.mean_loss(root, windows, progress=progress.advance)
        progress.phase("acceptance test under the memory limit", 1)
        document, done = measure_device(root, budget, golden)
        progress.advance()
    checks = _device_checks(document, done, budget) + _loss_checks(manifest, torch_loss, runtime_loss)
    measured = {
        "torch_heldout_nats": torch_loss,
        "heldout_nats": runtime_loss,
        "loss_nats": runtime_loss - float(manifest["predicted"]["original_heldout_nats"]),
    }
    if document is not None:
        measured |= document["memory"] | document["speed"]
    return ValidationReport(
        bundle_sha256=manifest["bundle_sha256"],
        checks=tuple(checks),
        enforced_by=done.enforced,
        measured=measured,
        predicted=manifest["predicted"],
        answer={"prompt": PROMPT, "text": document["answer"]} if document else {},
        rounds=tuple(rounds),
    )


def _device_checks(document: dict[str, Any] | None, done: LimitedRun, budget: int) -> list[Check]:
    if document is None:
        if done.killed:
            how = f"killed at the limit in phase '{done.last_phase}'"
        else:
            how = f"ended with status {done.returncode} in phase '{done.last_phase}': {done.tail}"
        return [Check(name="acceptance test on the runtime", value=how, limit="runs to its end", unit="", passed=False)]
    checks = [Check(**row) for row in document["checks"]]
    checks.append(Check(name="hard limit during the test", value=done.enforced or "not enforced", limit=budget, unit="", passed=None))
    for name, unit in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
        checks.append(Check(name=f"speed of {name} at full context", value=document["speed"][unit], limit=None, unit="tokens/s", passed=None))
    return checks


def _loss_checks(manifest: dict[str, Any], torch_loss: float, runtime_loss: float) -> list[Check]:
    original = float(manifest["predicted"]["original_heldout_nats"])
    gap = runtime_loss - torch_loss
    return [
        Check(name="held-out loss, source model", value=original, limit=None, unit="nats/token", passed=None),
        Check(name="held-out loss, same weights in torch", value=torch_loss, limit=None, unit="nats/token", passed=None),
        Check(name="held-out loss, bundle on the runtime", value=runtime_loss, limit=None, unit="nats/token", passed=None),
        Check(name="rise of the loss over the source, predicted", value=float(manifest["predicted"]["loss_nats"]), limit=None, unit="nats/token", passed=None),
        Check(name="rise of the loss over the source, measured", value=runtime_loss - original, limit=None, unit="nats/token", passed=None),
        Check(name="loss the runtime adds to its weights", value=gap, limit=_RUNTIME_LOSS_LIMIT, unit="nats/token", passed=gap <= _RUNTIME_LOSS_LIMIT),
    ]


def require_supported(provider: str) -> None:
    """RuntimeCheckError where validation cannot run: bundles for an accelerator this machine does not have."""
    import onnxruntime as ort

    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider", "webgpu": "WebGpuExecutionProvider"}[provider]
    if wanted not in ort.get_available_providers():
        raise RuntimeCheckError(f"this machine's ONNX Runtime has no {wanted}: validate on the device with check.py, or build with --no-validate")
