"""Polish from a plan: the original model and the planned options in, a file of tuned scales out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from packager.errors import UsageError
from packager.forms.floats import FloatForm
from packager.forms.registry import Form
from packager.planning.plan import LoadedMap, Plan, form_of
from packager.progress import Progress
from packager.scoremap.model import STORE_FILE
from packager.scoring.polish import Polish, polish
from packager.scoring.write_map import REFERENCE_FILE
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
    loaded: LoadedMap, plan: Plan, polishing: Polishing, out: Path, progress: Progress
) -> dict[str, float | str]:
    """Tune the plan's scales and write them to `out`, a safetensors file with `unit|scales` of each unit that moved.

    Returns what there is to say of it. Raises UsageError when the model is not the map's.
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
    heldout = torch.from_numpy(load_file(loaded.folder / REFERENCE_FILE)["heldout"].astype(np.int64))
    original, packed = checkpoint.load(), checkpoint.load()
    units = loaded.scoremap.units
    sources = find_sources(matrices_of((unit.matrix, unit.rows, unit.cols) for unit in units), packed)
    forms = {unit.name: form_of(plan, unit) for unit in units}
    with safe_open(loaded.folder / STORE_FILE, framework="numpy") as store:

        def load(source: Source, form: Form) -> dict[str, NDArray[np.generic]]:
            unit = source.unit
            return {
                name: store.get_tensor(f"{unit.name}|{form.label}|{name}")
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
    save_file({f"{name}|scales": np.ascontiguousarray(scales) for name, scales in done.scales.items()}, out)
    return _said(done, polishing, text.description)


def _said(done: Polish, polishing: Polishing, text: str) -> dict[str, float | str]:
    return {
        "minutes": polishing.minutes,
        "steps": done.steps,
        "text": text,
        "heldout_divergence_before_nats": done.before_nats,
        "heldout_divergence_after_nats": done.after_nats,
        "units": len(done.scales),
    }
