"""Sizes of a map, built in a scratch folder and run on ONNX Runtime: what a sweep measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from packager.bundle.writer import GRAPH_FILE, REFERENCE_FILE, write_contents
from packager.errors import RuntimeCheckError
from packager.io.leftovers import scratch_folder
from packager.planning.plan import LoadedMap, Plan, plan_file_bytes
from packager.planning.size_curve import Curve, Nats, measured_curve
from packager.planning.solver import choice_at, total_bytes
from packager.profile import DeviceProfile
from packager.progress import Progress
from packager.runtime.providers import require_supported
from packager.runtime.sessions import graph_losses
from packager.scoremap.identity import check_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Text to measure on: token ids (n, length) and, where it is known, what each but the first costs the source model
    (n, length - 1) in nats."""

    name: str
    windows: NDArray[np.int64]
    source_nats: Nats | None


def heldout_sample(loaded: LoadedMap) -> Sample:
    """The map's held-out windows, with their losses under the source model."""
    check_files(loaded.folder, loaded.identity)
    stored = load_file(loaded.folder / REFERENCE_FILE)
    return Sample(
        name=f"held-out windows of {loaded.identity.calibration.text}",
        windows=stored["heldout"].astype(np.int64),
        source_nats=stored["heldout_nats"].astype(np.float64),
    )


def text_sample(loaded: LoadedMap, text: Path, count: int) -> Sample:
    """The first windows of a text, at most `count`, by the map's own tokenizer. CalibrationError when it has none."""
    from transformers import AutoTokenizer

    from packager.source.calibration_text import text_windows

    check_files(loaded.folder, loaded.identity)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder / "model", trust_remote_code=False, local_files_only=True)
    return Sample(name=text.name, windows=text_windows(text, tokenizer, count).numpy(), source_nats=None)


def measure(
    loaded: LoadedMap,
    profile: DeviceProfile,
    curve: Curve,
    plans: Mapping[int, Plan],
    sample: Sample,
    *,
    progress: Progress,
) -> Curve:
    """`curve` with the losses that `plans` (by position on it) measure on ONNX Runtime, on `sample` cut to the context.

    Where the source model's losses are not known, the map's largest size, which is the float32 model, stands for it.
    RuntimeCheckError where this machine has no runtime for the profile.
    """
    require_supported(profile.provider)
    profile = replace(profile, context_tokens=curve.context_tokens)
    windows, source = sample.windows[:, : curve.context_tokens], sample.source_nats
    progress.phase(f"measuring {len(plans)} sizes on the runtime", (len(plans) + (source is None)) * len(windows))
    if source is None:
        largest = plan_file_bytes(loaded, profile, total_bytes(loaded.scoremap, choice_at(loaded.scoremap, 0)))
        source = _losses(loaded, largest, profile, windows, progress)
    losses = {position: _losses(loaded, plan, profile, windows, progress) for position, plan in plans.items()}
    return measured_curve(curve, sample.name, source[:, : curve.context_tokens - 1], losses)


def _losses(
    loaded: LoadedMap, plan: Plan, profile: DeviceProfile, windows: NDArray[np.int64], progress: Progress
) -> Nats:
    with scratch_folder() as scratch:
        root = scratch / "bundle"
        write_contents(loaded, plan, profile, root)
        losses = graph_losses(root / GRAPH_FILE, windows, advance=progress.advance).astype(np.float64)
    if not np.isfinite(losses).all():
        raise RuntimeCheckError(
            f"the size of {plan.file_bytes:,} bytes gives losses on ONNX Runtime that are not finite: its weights "
            f"overflow there"
        )
    return losses
