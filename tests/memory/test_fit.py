"""The fit of the memory model's coefficients: what is known comes back, what cannot be known keeps its default."""

from __future__ import annotations

import dataclasses
import random

import pytest

from packager.forms.floats import FloatForm
from packager.forms.registry import form_bytes, parse_form
from packager.memory.fit import NOT_OF_THE_DEVICE, Finding, Held, Reading, Workload, WorkUnit, fit
from packager.memory.geometry import Geometry
from packager.memory.model import activation_bytes, cache_bytes, resident_bytes
from packager.profile import MemoryCoefficients

BASE = MemoryCoefficients()
TRUE = dataclasses.replace(
    BASE,
    process_load_bytes=50 * 2**20,
    process_bytes=58 * 2**20,
    session_bytes_per_node=9_000,
    packed_scale_copies=1.25,
    tokenizer_live_bytes_per_entry=90,
    tokenizer_freed_bytes_per_entry=200,
    reuse_ratio=0.6,
    activation_copies=7.5,
    logit_copies=2.0,
    run_bytes=5 * 2**20,
    fault_bytes=32 * 2**10,
)
# (layers, hidden, vocabulary, tokenizer entries, form, context, chunk)
RUNS = [
    (24, 256, 8_192, 16_000, "q4g32", 1024, 32),
    (24, 256, 8_192, 16_000, "f32", 2048, 64),
    (2, 1024, 8_192, 16_000, "q4g16", 2048, 16),
    (2, 1024, 8_192, 16_000, "q4g256", 2048, 512),
    (2, 1024, 8_192, 16_000, "q8g32", 4096, 128),
    (16, 256, 98_304, 196_000, "q4g64", 2048, 128),
    (16, 256, 98_304, 196_000, "q4g64", 4096, 32),
    (4, 256, 98_304, 16_000, "q8g32", 1024, 256),
    (4, 256, 98_304, 16_000, "q4g64", 4096, 16),
    (8, 512, 32_000, 64_000, "q4g64", 4096, 64),
]


def work(layers: int, hidden: int, vocab: int, entries: int, label: str, context: int, chunk: int) -> Workload:
    form = parse_form(label)
    shapes = [(hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
    units = [
        WorkUnit(name=f"{layer}.{at}", rows=rows, cols=cols, form=form, kind="linear")
        for layer in range(layers)
        for at, (rows, cols) in enumerate(shapes)
    ]
    units += [WorkUnit(name=kind, rows=vocab, cols=hidden, form=form, kind=kind) for kind in ("embedding", "head")]  # type: ignore[arg-type]
    geometry = Geometry(
        layers=layers,
        hidden=hidden,
        intermediate=4 * hidden,
        heads=hidden // 64,
        kv_heads=4,
        head_dim=64,
        vocab=vocab,
        nodes=13 * layers + 15,
        tokenizer_bytes=1,
        tokenizer_entries=entries,
    )
    return Workload(
        geometry=geometry,
        units=tuple(units),
        context_tokens=context,
        prompt_tokens=context - 32,
        used_tokens=context,
        chunk_tokens=chunk,
    )


def measured(workload: Workload, true: MemoryCoefficients, noise: int = 0, heap: bool = True) -> Reading:
    """The process that the memory model describes, term by term, each step off by up to `noise` bytes."""
    dice = random.Random(str(workload))

    def off() -> int:
        return dice.randint(-noise, noise)

    geometry = workload.geometry
    packed = 0
    for unit in workload.units:
        if unit.kind != "embedding":
            packed += resident_bytes(unit.form, unit.rows, unit.cols, kind="head", coefficients=true)
            if not isinstance(unit.form, FloatForm):
                packed -= (
                    form_bytes(unit.form, unit.rows, unit.cols) - unit.form.tensors(unit.rows, unit.cols)["codes"].bytes
                )
    loaded = 25_000_000 + geometry.nodes * true.session_bytes_per_node + packed + off()
    live, freed = (
        geometry.tokenizer_entries * each
        for each in (true.tokenizer_live_bytes_per_entry, true.tokenizer_freed_bytes_per_entry)
    )
    ready = loaded + live + freed + off()
    asked = cache_bytes(geometry, workload.context_tokens, workload.chunk_tokens, true) + activation_bytes(
        geometry, workload.rows, true
    )
    phases = {phase.name: phase.bytes for phase in workload.estimate(true).phases}
    load_peak = phases["load"] + off()
    return Reading(
        workload=workload,
        start=Held(anonymous_bytes=16_000_000, mapped_bytes=20_000_000, peak_bytes=36_000_000),
        load=Held(anonymous_bytes=loaded, mapped_bytes=40_000_000, peak_bytes=load_peak),
        tokenizer=Held(anonymous_bytes=ready, mapped_bytes=40_000_000, peak_bytes=load_peak),
        end=Held(
            anonymous_bytes=ready + asked - min(asked, int(true.reuse_ratio * freed)) + off(),
            mapped_bytes=45_000_000,
            peak_bytes=max(load_peak, phases["prefill"] + off()),
        ),
        tokenizer_heap_bytes=live if heap else None,
    )


def readings(true: MemoryCoefficients = TRUE, noise: int = 0, heap: bool = True) -> list[Reading]:
    return [measured(work(*run), true, noise, heap) for run in RUNS]


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {item.name: item for item in findings}


def test_exact_readings_give_the_exact_coefficients() -> None:
    found, findings = fit(readings(), BASE, TRUE.fault_bytes)
    for name, item in by_name(findings).items():
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=2e-3), name
        assert bool(item.kept) == (name in NOT_OF_THE_DEVICE), name


@pytest.mark.parametrize(("scales", "activations", "reuse"), [(0.5, 2.0, 0.3), (1.0, 1.0, 0.5), (2.0, 0.7, 0.9)])
def test_noise_of_a_quarter_mebibyte_does_not_matter_much(scales: float, activations: float, reuse: float) -> None:
    true = dataclasses.replace(
        TRUE, packed_scale_copies=2 * scales, activation_copies=5 * activations, reuse_ratio=reuse
    )
    found, _ = fit(readings(true, noise=2**18), BASE, 65536)
    for name in ("packed_scale_copies", "activation_copies", "reuse_ratio", "tokenizer_freed_bytes_per_entry"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.15), name
    for item in readings(true, noise=2**18):
        assert item.workload.estimate(found).peak_bytes == pytest.approx(item.end.peak_bytes, rel=0.06)


def test_what_no_reading_shows_keeps_its_default() -> None:
    """One form and one vocabulary: scales go with nodes, logits with every run."""
    same = [
        measured(work(layers, 256, 8_192, 16_000, "f32", 2048, chunk), TRUE)
        for layers, chunk in ((2, 16), (8, 32), (16, 64), (24, 128), (12, 256), (4, 512))
    ]
    found, findings = fit(same, BASE, None)
    kept = {name for name, item in by_name(findings).items() if item.kept}
    assert {
        "packed_scale_copies",
        "tokenizer_live_bytes_per_entry",
        "tokenizer_freed_bytes_per_entry",
        "fault_bytes",
    } <= kept
    assert found.packed_scale_copies == BASE.packed_scale_copies
    assert found.session_bytes_per_node == TRUE.session_bytes_per_node
    assert "activation_copies" not in kept


def test_noise_as_large_as_what_is_sought_keeps_defaults() -> None:
    found, findings = fit(readings(noise=40 * 2**20), BASE, 65536)
    kept = by_name(findings)
    assert kept["logit_copies"].kept
    assert kept["session_bytes_per_node"].kept
    assert found.logit_copies == BASE.logit_copies


def test_without_malloc_s_word_the_tokenizer_s_share_keeps_its_default() -> None:
    found, findings = fit(readings(heap=False), BASE, 65536)
    assert by_name(findings)["tokenizer_live_bytes_per_entry"].kept == "too few readings"
    # Both together are still what they are.
    together = found.tokenizer_live_bytes_per_entry + found.tokenizer_freed_bytes_per_entry
    assert together == TRUE.tokenizer_live_bytes_per_entry + TRUE.tokenizer_freed_bytes_per_entry


def test_what_is_not_to_be_believed_is_not() -> None:
    found, findings = fit(readings(), BASE, 2**21)
    assert by_name(findings)["fault_bytes"].kept == "the readings say 2.097e+06, too far from it to be believed"
    assert found.fault_bytes == BASE.fault_bytes


def test_no_more_is_reused_than_was_freed() -> None:
    generous = [
        dataclasses.replace(
            item,
            end=dataclasses.replace(
                item.end, anonymous_bytes=item.end.anonymous_bytes - item.workload.geometry.tokenizer_entries * 200 // 2
            ),
        )
        for item in readings()
    ]
    found, _ = fit(generous, BASE, 65536)
    assert found.reuse_ratio == 1.0


def test_hardly_any_reading_keeps_every_default() -> None:
    found, findings = fit(readings()[:1], BASE, None)
    assert found == BASE
    assert all(item.kept for item in findings)
