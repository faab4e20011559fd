"""Validation: does the bundle, on the target runtime, do what was promised?

The device's own acceptance test runs in a fresh process under a hard memory limit equal to the budget; held-out loss
is measured on the runtime and in torch with the same weights. A failed check is a row of the report, and so is one
that was left out because torch is not installed: all that needs none is checked without.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from packager.bundle.folder import GOLDEN_FILE
from packager.bundle.manifest import Manifest, Measured
from packager.bundle.opening import OpenedBundle
from packager.errors import MissingExtraError
from packager.io.leftovers import scratch_folder
from packager.planning.size_curve import Nats
from packager.progress import Progress
from packager.runtime.providers import require_supported
from packager.scoremap.reference import HeldOut
from packager.validation.acceptance import Acceptance, run_acceptance
from packager.validation.left_out import left_out, missing_reference
from packager.validation.report import Answer, Check, Round, ValidationReport, Value, number
from packager.validation.rise import rise_check

if TYPE_CHECKING:
    from packager.validation.reference import Reference

# Float kernels differ from torch by the order of their sums; a wrong graph differs by far more.
_GRAPH_ERROR_LIMIT = 0.02
# What 8-bit activations may add.
_RUNTIME_LOSS_LIMIT = 0.05
_GRAPH_ERROR = "largest logit difference between ONNX Runtime (float kernels) and PyTorch, same weights"
_TORCH_LOSS = "held-out loss of the same weights in PyTorch"
_ADDED_LOSS = "loss that ONNX Runtime adds to the same weights in PyTorch"


def validate_bundle(
    bundle: OpenedBundle,
    *,
    progress: Progress,
    rounds: Sequence[Round] = (),
    torch_side: Reference | None = None,
) -> ValidationReport:
    """Check a bundle. It needs no map and no source model.

    `torch_side` is its reference where that was loaded already; a golden file is made for the occasion where the
    bundle has none. Checks that need a reference are left out where torch is not installed.
    """
    manifest, folder = bundle.manifest, bundle.folder
    require_supported(manifest.bounds.provider)
    missing = missing_reference() if torch_side is None else None
    if torch_side is None and missing is None:
        from packager.validation import reference

        progress.phase("torch reference of the same weights", 1)
        torch_side = reference.load_reference(bundle)
        progress.advance()
    held_out = folder.reference.held_out().cut(manifest.bounds.context_tokens)
    in_torch = None
    with scratch_folder() as scratch:
        golden = folder.golden
        if torch_side is not None:
            golden = _whole_golden(torch_side, bundle, scratch / GOLDEN_FILE)
            in_torch = _in_torch(torch_side, held_out, progress)
            del torch_side
        progress.phase("acceptance test under the memory limit", 1)
        accepted = run_acceptance(folder.root, manifest.bounds.budget_bytes, golden)
        progress.advance()
        not_compared = _golden_left_out(golden, missing) if missing else []
    # A runtime that cannot run the bundle in a process of its own is not let into this one, where a crash would be
    # ours.
    runs = accepted.document is not None or accepted.process.killed_at_limit
    on_runtime = _on_runtime(folder.graph, held_out, in_torch, progress) if runs else None
    document = accepted.document
    return ValidationReport(
        bundle_sha256=manifest.bundle_sha256,
        checks=(
            *_device_checks(accepted, manifest.bounds.budget_bytes),
            *not_compared,
            Check(name="key/value cache", value=manifest.cache, limit=None, unit="", passed=None),
            *_loss_checks(manifest, held_out, in_torch, on_runtime, missing),
        ),
        enforced_by=accepted.process.enforced,
        measured=_measured(accepted, _source_nats(held_out), in_torch, on_runtime),
        predicted=manifest.predicted,
        answer=Answer(prompt=document.prompt, text=document.answer) if document else None,
        rounds=tuple(rounds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _InTorch:
    """Mean loss of the bundle's weights in torch on the held-out windows in nats per token; `exact_logits` (length,
    vocabulary) of the first window, with a float cache."""

    nats: float
    exact_logits: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnRuntime:
    """Losses of the bundle on the runtime in nats, (windows, length - 1). `graph_error` is the largest difference of
    any logit between torch and the graph with float kernels and a float cache over the first window, in standard
    deviations of the logits; None where there is nothing to compare with.
    """

    losses: Nats
    graph_error: float | None

    @property
    def nats(self) -> float:
        """Their mean, per token."""
        return float(self.losses.mean())


def _whole_golden(torch_side: Reference, bundle: OpenedBundle, scratch: Path) -> Path:
    """The bundle's golden file; where it has none, or one of an earlier version without long prompts, one made for the
    occasion at `scratch`."""
    from packager.bundle.golden import has_contexts, with_contexts
    from packager.validation import reference

    own = bundle.folder.golden
    if not own.is_file():
        reference.write_golden(torch_side, bundle, scratch)
    elif not has_contexts(own):
        with_contexts(own, reference.golden_contexts(torch_side, bundle), scratch)
    return scratch if scratch.is_file() else own


def _source_nats(held_out: HeldOut) -> float:
    """Mean loss of the source model, which the map stored, in nats per token."""
    return float(held_out.source_nats.mean(dtype=np.float64))


def _in_torch(torch_side: Reference, held_out: HeldOut, progress: Progress) -> _InTorch:
    import torch

    from packager.scoring import losses

    progress.phase("held-out loss in torch", len(held_out.windows))
    nats, windows = [], torch.from_numpy(held_out.windows)
    for window in windows:
        nats.append(float(losses.token_losses(torch_side.model, window)[1].double().mean()))
        progress.advance()
    # A key between two codes may fall to either side: only with a float cache are graph and torch alike to the last
    # logit.
    return _InTorch(nats=float(np.mean(nats)), exact_logits=torch_side.exact_logits(windows[0]).numpy())


def _on_runtime(graph: Path, held_out: HeldOut, in_torch: _InTorch | None, progress: Progress) -> _OnRuntime:
    from packager.runtime import sessions

    windows, graph_error = held_out.windows, None
    progress.phase("held-out loss on the runtime", len(windows) + (in_torch is not None))
    if in_torch is not None:
        exact = sessions.run_window(sessions.full_logits_session(graph, float_kernels=True), windows[0])
        expected = in_torch.exact_logits
        graph_error = float(np.abs(exact - expected).max() / expected.std())
        progress.advance()
    losses = sessions.graph_losses(graph, windows, advance=progress.advance).astype(np.float64)
    return _OnRuntime(losses=losses, graph_error=graph_error)


def _measured(
    accepted: Acceptance, source_nats: float, in_torch: _InTorch | None, on_runtime: _OnRuntime | None
) -> Measured:
    document = accepted.document
    finite = on_runtime is not None and math.isfinite(on_runtime.nats)
    return Measured(
        heldout_nats=on_runtime.nats if on_runtime and finite else None,
        loss_nats=on_runtime.nats - source_nats if on_runtime and finite else None,
        torch_heldout_nats=in_torch.nats if in_torch else None,
        **(asdict(document.memory) | asdict(document.speed) if document else {}),
    )


def _device_checks(accepted: Acceptance, budget: int) -> list[Check]:
    document, done = accepted.document, accepted.process
    if document is None:
        return [
            Check(
                name="acceptance test on ONNX Runtime GenAI",
                value=done.ending,
                limit="runs to its end",
                unit="",
                passed=False,
            )
        ]
    checks = list(document.checks)
    if accepted.peak_bytes is None:
        checks.append(_reported("peak resident memory of the process", "not measured: this system does not say", ""))
    checks.append(
        Check(
            name="memory limit enforced during the test",
            value=done.enforced or "not enforced",
            limit=budget,
            unit="bytes",
            passed=None,
        )
    )
    if done.charged_bytes is not None:
        checks.append(
            Check(
                name="peak memory charged to the control group, page cache included",
                value=done.charged_bytes,
                limit=budget,
                unit="bytes",
                passed=None,
            )
        )
    speed = document.speed
    checks.append(_reported("prefill speed, longest prompt", speed.prefill_tokens_per_second, "tokens/s"))
    checks.append(_reported("decode speed, up to the full context", speed.decode_tokens_per_second, "tokens/s"))
    return checks


def _golden_left_out(golden: Path, missing: MissingExtraError) -> list[Check]:
    """The rows of the acceptance test that compare with what `golden`, the bundle's own file, does not hold and
    this environment cannot make."""
    from packager.bundle.golden import has_contexts

    names = ["tokenizer against the source model's", "next-token logits and greedy tokens against PyTorch"]
    if golden.is_file():
        names = []
    if not (golden.is_file() and has_contexts(golden)):
        names.append("divergence at the end of a full context")
    return [left_out(name, missing) for name in names]


def _loss_checks(
    manifest: Manifest,
    held_out: HeldOut,
    in_torch: _InTorch | None,
    on_runtime: _OnRuntime | None,
    missing: MissingExtraError | None,
) -> list[Check]:
    """What is known of the loss, in one order, whatever is left out."""
    checks = []
    if on_runtime is not None and on_runtime.graph_error is not None:
        checks.append(
            Check(
                name=_GRAPH_ERROR,
                value=number(on_runtime.graph_error),
                limit=_GRAPH_ERROR_LIMIT,
                unit="standard deviations of the logits",
                passed=on_runtime.graph_error <= _GRAPH_ERROR_LIMIT,
            )
        )
    elif missing:
        checks.append(left_out(_GRAPH_ERROR, missing))
    checks.append(_reported("held-out loss of the source model", _source_nats(held_out), "nats/token"))
    if in_torch is not None:
        checks.append(_reported(_TORCH_LOSS, in_torch.nats, "nats/token"))
    elif missing:
        checks.append(left_out(_TORCH_LOSS, missing))
    if on_runtime is not None:
        checks.append(_reported("held-out loss of the bundle on ONNX Runtime", number(on_runtime.nats), "nats/token"))
    predicted = manifest.predicted.loss_nats
    if on_runtime is None:
        checks.append(_reported("rise of the loss over the source, predicted", predicted, "nats/token"))
    else:
        checks.append(rise_check(held_out.source_nats.astype(np.float64), on_runtime.losses, predicted))
    if on_runtime is not None and in_torch is not None:
        gap = on_runtime.nats - in_torch.nats
        checks.append(
            Check(
                name=_ADDED_LOSS,
                value=number(gap),
                limit=_RUNTIME_LOSS_LIMIT,
                unit="nats/token, either sign",
                passed=abs(gap) <= _RUNTIME_LOSS_LIMIT,
            )
        )
    elif missing:
        checks.append(left_out(_ADDED_LOSS, missing))
    return checks


def _reported(name: str, value: Value, unit: str) -> Check:
    """A row that is held against nothing."""
    return Check(name=name, value=value, limit=None, unit=unit, passed=None)
