"""Validation: does the bundle, on the target runtime, do what was promised?

The device's own acceptance test runs in a fresh process under a hard memory limit equal to the budget; held-out loss
is measured on the runtime and in torch with the same weights. A failed check is a row of the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packager.bundle.manifest import Manifest
from packager.bundle.writer import GOLDEN_FILE, GRAPH_FILE
from packager.io.leftovers import scratch_folder
from packager.progress import Progress
from packager.runtime import device_check
from packager.runtime.limits import LimitedRun, run_limited
from packager.runtime.providers import require_supported
from packager.validation.report import Check, ValidationReport

if TYPE_CHECKING:
    from packager.validation.reference import Reference

PROMPT = "Name three things a small computer is good for."
# Float kernels differ from torch by the order of their sums; a wrong graph differs by far more.
_GRAPH_ERROR_LIMIT = 0.02
# What 8-bit activations may add.
_RUNTIME_LOSS_LIMIT = 0.05


def measure_device(
    root: Path, budget_bytes: int | None, golden: Path | None = None
) -> tuple[dict[str, Any] | None, LimitedRun]:
    """Run the acceptance test on the bundle in `root` under a limit. None when it did not finish.

    The test that runs is this package's, not the file in the bundle: nothing in a bundle is executed here.
    """
    script = Path(device_check.__file__)
    extra = ["--golden", str(golden)] if golden else []
    # -P keeps this folder off sys.path, so that the child imports what a device's own script would.
    done = run_limited([sys.executable, "-P", str(script), str(root), "--prompt", PROMPT, *extra], budget_bytes)
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return None, done
    # 0 and 3 are its own: a runtime that crashes once it has answered has crashed.
    return (document if done.returncode in (0, 3) else None), done


def validate_bundle(
    root: Path,
    manifest: Manifest,
    *,
    progress: Progress,
    rounds: Sequence[dict[str, Any]] = (),
    torch_side: Reference | None = None,
) -> ValidationReport:
    """Check the bundle in `root`. It needs no map and no source model.

    `torch_side` is its reference where that was loaded already; a golden file is made for the occasion where the
    bundle has none.
    """
    from packager.validation import reference

    require_supported(manifest.bounds.provider)
    if torch_side is None:
        progress.phase("torch reference of the same weights", 1)
        torch_side = reference.load_reference(root, manifest)
        progress.advance()
    with scratch_folder() as scratch:
        golden = root / GOLDEN_FILE
        if not golden.is_file():
            golden = scratch / GOLDEN_FILE
            reference.write_golden(torch_side, golden, context_tokens=manifest.bounds.context_tokens)
        torch_losses = _torch_losses(torch_side, progress)
        del torch_side
        progress.phase("acceptance test under the memory limit", 1)
        document, done = measure_device(root, manifest.bounds.budget_bytes, golden)
        progress.advance()
    # A runtime that cannot run the bundle in a process of its own is not let into this one, where a crash would be
    # ours.
    runs = document is not None or done.killed_at_limit
    heldout = _heldout(root / GRAPH_FILE, torch_losses, progress) if runs else None
    measured: dict[str, Any] = {"torch_heldout_nats": torch_losses.torch_nats}
    if heldout is not None:
        measured |= {"heldout_nats": heldout.runtime_nats, "loss_nats": heldout.runtime_nats - torch_losses.source_nats}
    if document is not None:
        measured |= document["memory"] | document["speed"]
    return ValidationReport(
        bundle_sha256=manifest.bundle_sha256,
        checks=(
            *_device_checks(document, done, manifest.bounds.budget_bytes),
            Check(name="key/value cache", value=manifest.cache, limit=None, unit="", passed=None),
            *_loss_checks(manifest, torch_losses, heldout),
        ),
        enforced_by=done.enforced,
        measured=measured,
        predicted=asdict(manifest.predicted),
        answer={"prompt": PROMPT, "text": document["answer"]} if document else {},
        rounds=tuple(rounds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _TorchLosses:
    """Mean losses on the held-out `windows` in nats per token, of the source model and of the bundle's weights in
    torch; `exact_logits` of the first window from the latter, with a float cache."""

    windows: NDArray[np.int64]
    source_nats: float
    torch_nats: float
    exact_logits: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Heldout:
    """Mean loss of the bundle on the runtime in nats per token. `graph_error` is the largest difference of any logit
    between torch and the graph with float kernels and a float cache over the first window, as a share of the logits'
    spread.
    """

    runtime_nats: float
    graph_error: float


def _torch_losses(torch_side: Reference, progress: Progress) -> _TorchLosses:
    from packager.scoring import losses

    progress.phase("held-out loss in torch", len(torch_side.heldout))
    nats = []
    for window in torch_side.heldout:
        nats.append(float(losses.token_losses(torch_side.model, window)[1].double().mean()))
        progress.advance()
    # A key between two codes may fall to either side: only with a float cache are graph and torch alike to the last
    # logit.
    exact = torch_side.exact_logits(torch_side.heldout[0]).numpy()
    return _TorchLosses(
        windows=torch_side.heldout.numpy(),
        source_nats=float(torch_side.source_nats.double().mean()),
        torch_nats=float(np.mean(nats)),
        exact_logits=exact,
    )


def _heldout(graph: Path, torch_losses: _TorchLosses, progress: Progress) -> _Heldout:
    from packager.runtime import sessions

    windows, expected = torch_losses.windows, torch_losses.exact_logits
    progress.phase("held-out loss on the runtime", len(windows) + 1)
    exact = sessions.run_window(sessions.full_logits_session(graph, float_kernels=True), windows[0])
    graph_error = float(np.abs(exact - expected).max() / expected.std())
    progress.advance()
    runtime_nats = sessions.graph_losses(graph, windows, advance=progress.advance)
    return _Heldout(runtime_nats=float(runtime_nats.mean(dtype=np.float64)), graph_error=graph_error)


def _device_checks(document: dict[str, Any] | None, done: LimitedRun, budget: int) -> list[Check]:
    if document is None:
        return [
            Check(
                name="acceptance test on the runtime", value=done.ending, limit="runs to its end", unit="", passed=False
            )
        ]
    checks = [Check(**row) for row in document["checks"]]
    if not document["memory"]:
        checks.append(
            Check(
                name="peak memory of the process",
                value="not measured: this system does not say",
                limit=None,
                unit="",
                passed=None,
            )
        )
    checks.append(
        Check(
            name="hard limit during the test", value=done.enforced or "not enforced", limit=budget, unit="", passed=None
        )
    )
    if done.charged_bytes is not None:
        checks.append(
            Check(
                name="most that the limit counted, files' pages too",
                value=done.charged_bytes,
                limit=budget,
                unit="bytes",
                passed=None,
            )
        )
    for name, unit in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
        checks.append(
            Check(
                name=f"speed of {name} at full context",
                value=document["speed"][unit],
                limit=None,
                unit="tokens/s",
                passed=None,
            )
        )
    return checks


def _loss_checks(manifest: Manifest, torch_losses: _TorchLosses, heldout: _Heldout | None) -> list[Check]:
    def reported(name: str, value: float) -> Check:
        return Check(name=name, value=value, limit=None, unit="nats/token", passed=None)

    in_torch = [
        reported("held-out loss, source model", torch_losses.source_nats),
        reported("held-out loss, same weights in torch", torch_losses.torch_nats),
        reported("rise of the loss over the source, predicted", manifest.predicted.loss_nats),
    ]
    if heldout is None:
        return in_torch
    gap = heldout.runtime_nats - torch_losses.torch_nats
    return [
        Check(
            name="largest difference of a logit, graph with float kernels against torch",
            value=heldout.graph_error,
            limit=_GRAPH_ERROR_LIMIT,
            unit="of the logits' spread",
            passed=heldout.graph_error <= _GRAPH_ERROR_LIMIT,
        ),
        *in_torch[:2],
        reported("held-out loss, bundle on the runtime", heldout.runtime_nats),
        *in_torch[2:],
        reported("rise of the loss over the source, measured", heldout.runtime_nats - torch_losses.source_nats),
        Check(
            name="loss that the runtime adds to its weights",
            value=gap,
            limit=_RUNTIME_LOSS_LIMIT,
            unit="nats/token, either way",
            passed=abs(gap) <= _RUNTIME_LOSS_LIMIT,
        ),
    ]
