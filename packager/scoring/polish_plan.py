"""Polish from a plan: the original model and the planned options in, a file of tuned scales out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from packager.bundle.manifest import Polish
from packager.errors import UsageError
from packager.forms.floats import FloatForm
from packager.forms.registry import Form
from packager.planning.plan import Plan, form_of
from packager.progress import Progress
from packager.scoremap.folder import store_key
from packager.scoremap.opening import OpenedMap
from packager.scoring.polish import polish
from packager.source.calibration_text import load_calibration
from packager.source.checkpoint import Checkpoint
from packager.source.unit_weights import Source, find_sources, matrices_of

_TOKENS = 1 << 19


@dataclass(frozen=True, kw_only=True, slots=True)
class Polishing:
    """What polish needs beside a map: the original model, minutes, and text to train on (built-in text where empty)."""

    checkpoint: Checkpoint
    minutes: float
    calibration_paths: Sequence[Path] = ()


def polish_plan(
    loaded: OpenedMap, plan: Plan, polishing: Polishing, progress: Progress
) -> tuple[dict[str, NDArray[np.float32]], Polish]:
    """Tune the plan's scales: those of each unit that moved, and what there is to say of it.

    Raises UsageError when the model is not the map's.
    """
    checkpoint, identity = polishing.checkpoint, loaded.identity
    if checkpoint.sha256() != identity.model.sha256:
        raise UsageError(
            f"--model {checkpoint.name} is not the model of the map ({identity.model.name}, sha256 "
            f"{identity.model.sha256[:16]}…): its weights differ"
        )
    progress.phase("reading the original model", 1)
    text = load_calibration(
        polishing.calibration_paths, checkpoint.tokenizer(), tokens=_TOKENS, seed=identity.settings.seed
    )
    heldout = torch.from_numpy(loaded.folder.reference.held_out().windows)
    original, packed = checkpoint.load(), checkpoint.load()
    units = loaded.scoremap.units
    sources = find_sources(matrices_of((unit.matrix, unit.rows, unit.cols) for unit in units), packed)
    forms = {unit.name: form_of(plan, unit) for unit in units}
    with safe_open(loaded.folder.store, framework="numpy") as store:

        def load(source: Source, form: Form) -> dict[str, NDArray[np.generic]]:
            unit = source.unit
            return {
                name: store.get_tensor(store_key(unit.name, form.label, name))
                for name in form.tensors(unit.rows, unit.cols)
            }

        with torch.no_grad():
            for source in sources:
                form, unit = forms[source.unit.name], source.unit
                if not isinstance(form, FloatForm):
                    source.weight(packed).copy_(
                        torch.from_numpy(form.dequantize(load(source, form), unit.rows, unit.cols))
                    )
        progress.advance()
        done = polish(
            original,
            packed,
            sources,
            forms,
            load,
            windows=text.windows,
            heldout=heldout,
            seconds=60 * polishing.minutes,
            rounds_inputs=identity.settings.kernels.rounds_inputs,
            progress=progress,
        )
    said = Polish(
        minutes=polishing.minutes,
        steps=done.steps,
        text=text.description,
        heldout_divergence_before_nats=done.before_nats,
        heldout_divergence_after_nats=done.after_nats,
        units=len(done.scales),
    )
    return done.scales, said
