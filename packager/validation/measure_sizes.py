"""Sizes of a map, built in a scratch folder and run on ONNX Runtime: what a sweep measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packager.bundle.folder import BundleFolder
from packager.bundle.writer import Recipe, write_contents
from packager.errors import RuntimeCheckError, require_extra
from packager.io.leftovers import scratch_folder
from packager.planning.plan import Plan, plan_file_bytes
from packager.planning.size_curve import Curve, Nats, measured_curve
from packager.planning.solver import choice_at, total_bytes
from packager.profile import DeviceProfile
from packager.progress import Progress
from packager.runtime.providers import require_supported
from packager.runtime.sessions import graph_losses
from packager.scoremap.opening import OpenedMap


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationText:
    """Text to measure on: token ids (n, length) and, where it is known, what each but the first costs the source model
    (n, length - 1) in nats."""

    name: str
    windows: NDArray[np.int64]
    source_nats: Nats | None


def held_out_text(opened: OpenedMap) -> EvaluationText:
    """The map's held-out windows, with their losses under the source model."""
    opened.check_files()
    stored = opened.folder.reference.held_out()
    return EvaluationText(
        name=f"held-out windows of {opened.identity.calibration.text}",
        windows=stored.windows,
        source_nats=stored.source_nats.astype(np.float64),
    )


def text_of_file(opened: OpenedMap, path: Path, count: int) -> EvaluationText:
    """The first windows of a text file, at most `count`, by the map's own tokenizer. CalibrationError when it has none,
    MissingExtraError where nothing here can run the tokenizer."""
    require_extra("score", ("torch", "transformers"), "measuring on a text of your own")
    from transformers import AutoTokenizer

    from packager.source.calibration_text import text_windows

    opened.check_files()
    tokenizer = AutoTokenizer.from_pretrained(opened.folder.side_folder, trust_remote_code=False, local_files_only=True)
    return EvaluationText(name=path.name, windows=text_windows(path, tokenizer, count).numpy(), source_nats=None)


def measure(
    opened: OpenedMap,
    profile: DeviceProfile,
    curve: Curve,
    plans: Mapping[int, Plan],
    text: EvaluationText,
    *,
    progress: Progress,
) -> Curve:
    """`curve` with the losses that `plans` (by position on it) measure on ONNX Runtime, on `text` cut to the context.

    Where the source model's losses are not known, the map's largest size, which is the float32 model, stands for it.
    RuntimeCheckError where this machine has no runtime for the profile.
    """
    require_supported(profile.provider)
    profile = replace(profile, context_tokens=curve.context_tokens)
    windows, source = text.windows[:, : curve.context_tokens], text.source_nats
    progress.phase(f"measuring {len(plans)} sizes on the runtime", (len(plans) + (source is None)) * len(windows))
    if source is None:
        largest = plan_file_bytes(opened, profile, total_bytes(opened.scoremap, choice_at(opened.scoremap, 0)))
        source = _losses(opened, largest, profile, windows, progress)
    losses = {position: _losses(opened, plan, profile, windows, progress) for position, plan in plans.items()}
    return measured_curve(curve, text.name, source[:, : curve.context_tokens - 1], losses)


def _losses(
    opened: OpenedMap, plan: Plan, profile: DeviceProfile, windows: NDArray[np.int64], progress: Progress
) -> Nats:
    with scratch_folder() as scratch:
        root = scratch / "bundle"
        write_contents(Recipe(source=opened, plan=plan, profile=profile), root)
        losses = graph_losses(BundleFolder(root=root).graph, windows, advance=progress.advance).astype(np.float64)
    if not np.isfinite(losses).all():
        raise RuntimeCheckError(
            f"the size of {plan.file_bytes:,} bytes gives losses on ONNX Runtime that are not finite: its weights "
            "overflow there"
        )
    return losses
