"""The memory model's coefficients, measured on this machine: made-up models run in fresh processes, the fit, and how
well it predicts processes that it has not seen.

The models are chosen so that each coefficient shows in some of them and not in others: many nodes, wide activations,
large and small blocks, a large vocabulary with and without a large tokenizer.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packager.errors import RuntimeCheckError, UsageError
from packager.forms.registry import has_kernels, parse_form
from packager.io.leftovers import scratch_folder
from packager.memory.fit import Finding, Held, Reading, fit
from packager.memory.synthetic import (
    ProcessSettings,
    SyntheticModel,
    make_config,
    make_synthetic,
    workload,
    write_synthetic,
)
from packager.profile import DeviceProfile, MemoryCoefficients
from packager.progress import Progress
from packager.runtime.device_check import memory
from packager.runtime.limits import run_limited

_LEAST_READINGS = 6
_FAULT_TOUCHES = 64
_FAULT_DISTANCE = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessToMeasure:
    """One process: linear units in `form`, embedding and head in `head`."""

    form: str
    head: str
    context_tokens: int
    prompt_tokens: int
    chunk_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelToMeasure:
    """Processes of one made-up model. `tokenizer_tokens` is the size of its tokenizer, 0 for one as large as the
    vocabulary."""

    config: Mapping[str, Any]
    processes: tuple[ProcessToMeasure, ...]
    tokenizer_tokens: int = 0


def _llama(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


def _process(form: str, head: str, context: int, prompt: int, chunk: int) -> ProcessToMeasure:
    return ProcessToMeasure(form=form, head=head, context_tokens=context, prompt_tokens=prompt, chunk_tokens=chunk)


FITTED: dict[str, ModelToMeasure] = {
    "deep": ModelToMeasure(
        config=_llama(256, 24, 512, 4, 2, 8_192),
        processes=(
            _process("q4g32", "q4g32", 256, 200, 32),
            _process("f32", "f32", 512, 480, 32),
            _process("q8g32", "q8g32", 1024, 900, 128),
        ),
    ),
    "wide": ModelToMeasure(
        config=_llama(1024, 2, 4096, 16, 4, 8_192),
        processes=(
            _process("q4g16", "q4g16", 512, 480, 16),
            _process("q4g256", "q4g256", 512, 480, 512),
            _process("q8g32", "q8g32", 1024, 900, 128),
            _process("q2g64", "q8g128", 512, 480, 256),
            _process("f32", "f32", 256, 16, 16),
        ),
    ),
    "many words": ModelToMeasure(
        config=_llama(256, 16, 512, 4, 4, 98_304),
        processes=(
            _process("q4g64", "q4g64", 1024, 900, 128),
            _process("q4g64", "q4g64", 2048, 1000, 32),
            _process("q4g64", "q8g64", 64, 16, 16),
            _process("f32", "f32", 256, 16, 16),
        ),
    ),
    "many logits": ModelToMeasure(
        config=_llama(256, 4, 512, 4, 4, 98_304),
        processes=(
            _process("q4g64", "q4g64", 1024, 900, 128),
            _process("q4g64", "q4g64", 2048, 16, 16),
            _process("q8g32", "q8g32", 512, 480, 512),
        ),
        tokenizer_tokens=8_192,
    ),
}
"""What the coefficients are fitted on."""

HELD_OUT: dict[str, ModelToMeasure] = {
    "held out": ModelToMeasure(
        config=_llama(512, 8, 1536, 8, 4, 32_000) | {"model_type": "qwen3", "tie_word_embeddings": True},
        processes=(
            _process("q4g64z", "q8g64", 1024, 992, 128),
            _process("q8g128", "q8g128", 512, 480, 64),
            _process("q2g64", "q8g64", 2048, 1000, 128),
            _process("f32", "f32", 256, 16, 16),
        ),
    ),
}
"""What they are tried on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A process that the fit has not seen: its peak as measured, as calibrated, and as the base profile has it;
    bytes."""

    name: str
    measured_bytes: int
    calibrated_bytes: int
    base_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCoefficients:
    """What was measured. `failed` says of each process that did not end well how it ended."""

    coefficients: MemoryCoefficients
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...]
    failed: tuple[str, ...]

    def section(self) -> dict[str, str | int | float]:
        """The [memory] section of a profile: where the values come from, and those that were measured."""
        measured = {item.name for item in self.findings if not item.kept}
        said = {
            field.name
            for field in dataclasses.fields(self.coefficients)
            if isinstance(getattr(self.coefficients, field.name), str)
        }
        return {key: value for key, value in dataclasses.asdict(self.coefficients).items() if key in measured | said}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, bytes throughout."""
        return dataclasses.asdict(self)


def calibrate(
    profile: DeviceProfile,
    folder: Path,
    progress: Progress,
    *,
    fitted: Mapping[str, ModelToMeasure] = FITTED,
    held_out: Mapping[str, ModelToMeasure] = HELD_OUT,
) -> MeasuredCoefficients:
    """Measure on this machine what `profile`'s runtime settings take; `folder` holds the models meanwhile.

    Raises UsageError for a profile of another provider than the CPU or with too few kernels for a fit,
    RuntimeCheckError where this system does not tell a process's memory or too few runs ended well.
    """
    if profile.provider != "cpu":
        raise UsageError(
            f"profile {profile.name} is for {profile.provider}: the coefficients are those of ONNX Runtime's CPU "
            "kernels"
        )
    if "anonymous_bytes" not in memory():
        raise RuntimeCheckError("this system has no /proc/self/status: the memory of a process cannot be measured here")
    possible = sum(_settings(profile, process) is not None for model in fitted.values() for process in model.processes)
    if possible < _LEAST_READINGS:
        raise UsageError(
            f"profile {profile.name} has kernels for {possible} of the {_count(fitted)} runs that coefficients are "
            f"fitted to, {_LEAST_READINGS} are needed: "
            "calibrate a profile with runtime.bits = [2, 4, 8] here and copy its [memory] section"
        )
    failed: list[str] = []
    readings = [
        reading for _, reading in _measure(profile, fitted, folder, "measuring made-up models", progress, failed)
    ]
    if len(readings) < _LEAST_READINGS:
        raise RuntimeCheckError(
            f"only {len(readings)} of {_count(fitted)} runs ended well, {_LEAST_READINGS} are needed: {failed[-1]}"
        )
    coefficients, findings = fit(readings, profile.coefficients, _fault_bytes(folder))
    coefficients = dataclasses.replace(
        coefficients,
        measured_on=_machine(),
        measured_date=datetime.now(UTC).date().isoformat(),
        onnxruntime=version("onnxruntime"),
        onnxruntime_genai=version("onnxruntime-genai"),
        packager=version("edge-packager"),
    )
    trials = [
        Trial(
            name=name,
            measured_bytes=reading.end.peak_bytes,
            calibrated_bytes=reading.workload.estimate(coefficients).peak_bytes,
            base_bytes=reading.workload.estimate(profile.coefficients).peak_bytes,
        )
        for name, reading in _measure(profile, held_out, folder, "measuring others to compare", progress, failed)
    ]
    return MeasuredCoefficients(
        coefficients=coefficients, findings=findings, trials=tuple(trials), failed=tuple(failed)
    )


def _count(models: Mapping[str, ModelToMeasure]) -> int:
    return sum(len(model.processes) for model in models.values())


def _measure(
    profile: DeviceProfile,
    models: Mapping[str, ModelToMeasure],
    folder: Path,
    phase: str,
    progress: Progress,
    failed: list[str],
) -> list[tuple[str, Reading]]:
    """(name, reading) of every process that the device has kernels for and that ended well."""
    progress.phase(phase, _count(models))
    readings = []
    for name, model in models.items():
        with scratch_folder(folder) as scratch:
            synthetic = make_synthetic(
                name, make_config(dict(model.config)), scratch / "graph", tokens=model.tokenizer_tokens
            )
            for process in model.processes:
                title = (
                    f"{name}, {process.form} with {process.head}, context {process.context_tokens}, prompt "
                    f"{process.prompt_tokens}, chunk {process.chunk_tokens}"
                )
                settings = _settings(profile, process)
                if settings is not None:
                    found = read_process(synthetic, settings, scratch / "bundle")
                    if isinstance(found, Reading):
                        readings.append((title, found))
                    else:
                        failed.append(f"{title}: {found}")
                progress.advance()
    return readings


def _settings(profile: DeviceProfile, process: ProcessToMeasure) -> ProcessSettings | None:
    """The process on this device, None where it lacks the kernels."""
    forms = [parse_form(process.form), parse_form(process.head)]
    if not all(has_kernels(form, profile.bits) for form in forms):
        return None
    return ProcessSettings(
        form=forms[0],
        head=forms[1],
        context_tokens=process.context_tokens,
        prompt_tokens=process.prompt_tokens,
        chunk_tokens=process.chunk_tokens,
        accuracy_level=profile.accuracy_level,
        threads=profile.threads,
    )


def read_process(model: SyntheticModel, settings: ProcessSettings, bundle: Path) -> Reading | str:
    """Run the model in a fresh process, written to `bundle` for as long as that takes; or how the process failed."""
    write_synthetic(model, settings, bundle)
    # -P keeps the working folder off sys.path, so that the child imports what a device's own script would.
    done = run_limited(
        [sys.executable, "-P", "-m", "packager.runtime.memory_probe", str(bundle)], None, timeout_seconds=300
    )
    shutil.rmtree(bundle)
    if done.returncode:
        return done.ending
    found = json.loads(done.stdout.splitlines()[-1])
    held = {name: Held(**step) for name, step in found["steps"].items()}
    return Reading(workload=workload(model, settings), tokenizer_heap_bytes=found["tokenizer_heap_bytes"], **held)


def _fault_bytes(folder: Path) -> int | None:
    """Bytes that touching one byte of a mapped file makes resident; None where the system does not tell.

    The least of many touches: where the page cache happens to hold a huge page, one touch maps all of it.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(_FAULT_TOUCHES * _FAULT_DISTANCE))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            resident = [0]
            for at in range(0, len(mapped), _FAULT_DISTANCE):
                mapped.seek(at)
                mapped.read_byte()
                try:
                    own = (
                        Path("/proc/self/smaps")
                        .read_text(encoding="utf-8", errors="replace")
                        .partition(Path(file.name).name)[2]
                    )
                except OSError:
                    return None
                found = re.search(r"^Rss: +(\d+) kB", own, re.MULTILINE)
                resident.append(int(found[1]) * 1024 if found else 0)
    return min((after - before for before, after in itertools.pairwise(resident) if after > before), default=None)


def _machine() -> str:
    """Architecture and processor, as well as the system tells."""
    for path, key in (("/proc/cpuinfo", "model name"), ("/proc/device-tree/model", "")):
        try:
            lines: Sequence[str] = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names = [line.partition(":")[2].strip() if key else line.rstrip("\0") for line in lines if line.startswith(key)]
        if names and names[0]:
            return f"{platform.machine()}, {names[0]}"
    return platform.machine()
