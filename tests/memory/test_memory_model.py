"""packager.memory.model: exact on a small example, and monotone, consistent and bounded on all others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.forms.blocks import BITS, BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.floats import FloatForm
from packager.forms.kinds import KINDS, Kind
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, form_bytes, parse_form
from packager.memory.geometry import Geometry, tokenizer_entries
from packager.memory.model import (
    MemoryEstimate,
    cache_bytes,
    estimate,
    graph_nodes,
    looked_up_bytes,
    resident_bytes,
    widened_bytes,
)
from packager.profile import MemoryCoefficients

COEFFICIENTS = dataclasses.replace(MemoryCoefficients(), packed_scale_copies=2.0)
ROUND = dataclasses.replace(
    COEFFICIENTS,
    process_load_bytes=1_000,
    process_bytes=2_000,
    session_bytes_per_node=10,
    packed_scale_copies=2.0,
    tokenizer_live_bytes_per_entry=2,
    tokenizer_freed_bytes_per_entry=3,
    tokenizer_file_bytes_per_entry=10,
    reuse_ratio=0.5,
    kv_element_bytes=4,
    activation_copies=2.0,
    logit_copies=1.0,
    run_bytes=100,
)
TINY = Geometry(
    layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=50, nodes=5, tokenizer_bytes=400
)

block_forms = st.builds(BlockForm, bits=st.sampled_from(BITS), block=st.sampled_from(BLOCKS), zeros=st.booleans())
factor_forms = st.builds(
    lambda form, times: LowRankForm(rank=form.block * times, factors=form), block_forms, st.integers(1, 4)
)
table_forms = st.one_of(st.sampled_from([FloatForm(label="f32")]), block_forms)
pivot_forms = st.builds(
    lambda form, times: PivotForm(rank=form.block * times, factors=form), block_forms, st.integers(1, 4)
)
forms = st.one_of(table_forms, factor_forms)
sides = st.integers(1, 5_000)
geometries = st.builds(
    Geometry,
    layers=st.integers(1, 80),
    hidden=st.integers(8, 8_192),
    intermediate=st.integers(8, 30_000),
    heads=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(4, 256),
    vocab=st.integers(256, 300_000),
    nodes=st.integers(1, 4_000),
    tokenizer_bytes=st.integers(0, 50_000_000),
    tokenizer_entries=st.integers(0, 800_000),
)
requests = st.fixed_dictionaries(
    {
        "weights_bytes": st.integers(0, 2**36),
        "largest_unit_bytes": st.integers(0, 2**32),
        "context_tokens": st.integers(1, 131_072),
        "prompt_tokens": st.integers(1, 131_072),
        "chunk_tokens": st.integers(1, 4_096),
    }
)


def estimated(
    geometry: Geometry, request: dict[str, int], coefficients: MemoryCoefficients = COEFFICIENTS
) -> MemoryEstimate:
    return estimate(geometry, coefficients=coefficients, **request)


def resident(form: Form, rows: int, cols: int, kind: Kind, **options: Any) -> int:
    return resident_bytes(form, rows, cols, kind=kind, coefficients=COEFFICIENTS, **options)


def test_exact_small_example() -> None:
    result = estimate(
        TINY,
        weights_bytes=5_000,
        looked_up_bytes=500,
        largest_unit_bytes=700,
        context_tokens=10,
        prompt_tokens=8,
        chunk_tokens=4,
        coefficients=ROUND,
    )
    # 40 entries; cache 2·2·1·4·10·4; prefill 4 rows·(16+8)·4·2 + 50·4 + 100; decode the same for one row.
    common = {
        "Python and the runtime libraries": 2_000,
        "runtime session (graph nodes)": 50,
        "weights": 5_000,
        "tokenizer": 80,
        "freed tokenizer memory, not reused": 60,
        "key/value cache": 640,
        "rotary embedding tables": 160,
    }
    assert result.to_dict() == {
        "peak_bytes": 9_058,
        "peak_phase": "prefill",
        "phases": {
            "load": {
                "Python and the runtime libraries": 1_000,
                "runtime session (graph nodes)": 50,
                "weights": 4_500,
                "largest matrix, while it is repacked": 700,
            },
            "prefill": common | {"activations and logits": 1_068},
            "decode": common | {"activations and logits": 492, "memory that the runtime's allocator keeps": 576},
        },
    }


def test_load_is_the_peak_of_a_model_that_is_one_large_float_matrix() -> None:
    result = estimate(
        TINY,
        weights_bytes=10**6,
        largest_unit_bytes=10**6,
        context_tokens=10,
        prompt_tokens=8,
        chunk_tokens=4,
        coefficients=ROUND,
    )
    assert (result.peak_phase, result.peak_bytes) == ("load", 1_000 + 50 + 2 * 10**6)
    assert [item.name for item in result.items] == [
        "Python and the runtime libraries",
        "runtime session (graph nodes)",
        "weights",
        "largest matrix, while it is repacked",
    ]


@pytest.mark.parametrize(
    ("label", "linear"),
    [
        ("f32", 64 * 576 * 4),
        ("q4g64", 64 * (288 + 3 * 9 * 4)),
        ("q4g64z", 64 * (288 + 5 + 3 * 9 * 4)),
        ("q8g128", 64 * (640 + 3 * 5 * 4)),  # K padded to 5 blocks
        ("q2g64", 64 * (12 * 16 + 9 * 4 + 2 * 12 * 4)),  # 9 blocks in the file, 12 in the kernel's order
        ("r64.q4g64", 64 * (288 + 3 * 9 * 4) + 64 * (32 + 3 * 4)),
        ("r10.f32", 4 * 10 * (64 + 576)),
        ("p32.q4g32", 32 * (288 + 3 * 18 * 4) + 32 * (16 + 3 * 4) + 64 * 4),
        ("p10.f32", 4 * 10 * (64 + 576 - 10) + 64 * 4),
    ],
)
def test_resident_bytes_of_a_matrix_64_by_576(label: str, linear: int) -> None:
    assert resident(parse_form(label), 64, 576, "linear") == linear
    assert resident(parse_form(label), 64, 576, "head") == linear


@pytest.mark.parametrize("label", ["f32", "q4g64", "q8g32z", "q2g128"])
def test_kinds_of_a_table(label: str) -> None:
    form = parse_form(label)
    file_bytes = form_bytes(form, 50_000, 512)
    assert resident(form, 50_000, 512, "embedding") == file_bytes
    assert resident(form, 50_000, 512, "tied") == resident(form, 50_000, 512, "head") + file_bytes
    assert looked_up_bytes(form, 50_000, 512, kind="head", coefficients=COEFFICIENTS) == 0
    assert (
        0
        < resident(form, 50_000, 512, "embedding", context_tokens=16)
        <= len(form.tensors(1, 1)) * 16 * COEFFICIENTS.fault_bytes
    )


def test_refusals() -> None:
    with pytest.raises(ArtifactError, match=r"kind 'bias' is unknown: expected one of linear, head, embedding, tied"):
        resident(FloatForm(label="f32"), 4, 4, "bias")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"form 'r64.q4g64': an embedding cannot be stored in factors"):
        resident(parse_form("r64.q4g64"), 128, 128, "tied")


def test_cache_is_float32_keys_and_values() -> None:
    assert cache_bytes(TINY, 1_024, 128, COEFFICIENTS) == 2 * 2 * 1 * 4 * 1_024 * 4
    sliding = dataclasses.replace(TINY, sliding_layers=1, sliding_window=200)
    assert cache_bytes(sliding, 1_024, 128, COEFFICIENTS) == 2 * (1_024 + 328) * 1 * 4 * 4
    assert cache_bytes(sliding, 100, 128, COEFFICIENTS) == cache_bytes(TINY, 100, 128, COEFFICIENTS)


def test_a_cache_of_codes_takes_a_byte_an_element() -> None:
    codes = dataclasses.replace(TINY, cache_element_bytes=1)
    assert 4 * cache_bytes(codes, 1_024, 128, COEFFICIENTS) == cache_bytes(TINY, 1_024, 128, COEFFICIENTS)


def test_a_chunk_over_a_cache_of_codes_holds_one_layers_past_in_floats() -> None:
    codes = dataclasses.replace(TINY, cache_element_bytes=1)
    assert widened_bytes(codes, 4, 1_000) == 10 * 2 * 1_000 * 1 * 4
    assert widened_bytes(codes, 1, 1_000) == widened_bytes(TINY, 4, 1_000) == 0
    assert graph_nodes(codes) == graph_nodes(TINY) + 2 * 16
    sliding = dataclasses.replace(codes, sliding_layers=2, sliding_window=200)
    assert widened_bytes(sliding, 4, 1_000) == 0
    assert graph_nodes(sliding) == graph_nodes(TINY)
    request = {
        "weights_bytes": 0,
        "largest_unit_bytes": 0,
        "context_tokens": 1_024,
        "prompt_tokens": 1_000,
        "chunk_tokens": 4,
    }
    prefill, decode = (
        {item.name: item.bytes for item in phase.items} for phase in estimated(codes, request).phases[1:]
    )
    assert prefill["one layer's key/value cache, dequantised"] == widened_bytes(codes, 4, 1_000)
    assert sum(prefill.values()) == sum(decode.values())


def test_tokenizer_entries_counts_tokens_and_merges() -> None:
    assert tokenizer_entries({"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}) == 4
    assert tokenizer_entries({"model": {"vocab": [["a", -1.0]]}}) == 1
    assert tokenizer_entries({}) == 0


def test_tokenizer_counts_by_entries_where_they_are_known() -> None:
    known = dataclasses.replace(TINY, tokenizer_entries=40, tokenizer_bytes=1)
    request = {"weights_bytes": 0, "largest_unit_bytes": 0, "context_tokens": 10, "prompt_tokens": 8, "chunk_tokens": 4}
    assert estimated(known, request, ROUND) == estimated(TINY, request, ROUND)


@given(geometries, requests, st.integers(0, 2**34))
def test_monotone_in_weights(geometry: Geometry, request_: dict[str, int], more: int) -> None:
    heavier = request_ | {"weights_bytes": request_["weights_bytes"] + more}
    assert (
        estimated(geometry, request_).peak_bytes
        <= estimated(geometry, heavier).peak_bytes
        <= estimated(geometry, request_).peak_bytes + more
    )


@given(
    geometries,
    requests,
    st.sampled_from(["context_tokens", "prompt_tokens", "chunk_tokens", "largest_unit_bytes"]),
    st.integers(1, 10_000),
)
def test_monotone_in_everything_else(geometry: Geometry, request_: dict[str, int], key: str, more: int) -> None:
    larger = request_ | {key: request_[key] + more}
    assert estimated(geometry, request_).peak_bytes <= estimated(geometry, larger).peak_bytes


@given(geometries, requests)
def test_items_sum_up_to_the_peak(geometry: Geometry, request_: dict[str, int]) -> None:
    result = estimated(geometry, request_)
    assert [phase.name for phase in result.phases] == ["load", "prefill", "decode"]
    assert result.peak_bytes == sum(item.bytes for item in result.items) == max(phase.bytes for phase in result.phases)
    assert all(item.bytes >= 0 for phase in result.phases for item in phase.items)
    plain = result.to_dict()
    assert sum(plain["phases"][plain["peak_phase"]].values()) == plain["peak_bytes"]


@given(forms, sides, sides)
def test_a_matrix_never_takes_less_than_its_file(form: Form, rows: int, cols: int) -> None:
    assert resident(form, rows, cols, "linear") >= form_bytes(form, rows, cols)


@given(pivot_forms, st.integers(1_025, 5_000), sides)
def test_a_pivot_form_never_takes_less_than_its_file(form: Form, rows: int, cols: int) -> None:
    assert resident(form, rows, cols, "linear") >= form_bytes(form, rows, cols)


@given(table_forms, sides, sides, st.sampled_from(KINDS), st.integers(0, 100_000), st.integers(0, 100_000))
def test_more_tokens_touch_more_of_a_table(
    form: Form, rows: int, cols: int, kind: Kind, tokens: int, more: int
) -> None:
    few, many, all_ = (
        resident(form, rows, cols, kind, context_tokens=count) for count in (tokens, tokens + more, None)
    )
    assert few <= many <= all_
    whole = looked_up_bytes(form, rows, cols, kind=kind, coefficients=COEFFICIENTS)
    assert whole == (form_bytes(form, rows, cols) if kind in ("embedding", "tied") else 0)


@given(table_forms, sides, sides, st.integers(1, 100_000))
def test_tied_is_head_and_embedding(form: Form, rows: int, cols: int, tokens: int) -> None:
    head, embedding, tied = (
        resident(form, rows, cols, kind, context_tokens=tokens) for kind in ("head", "embedding", "tied")
    )
    assert tied == head + embedding


def test_rows_without_a_token_are_never_looked_up() -> None:
    """A table is made larger than its tokenizer for speed, or for tokens to come."""

    def touched(named: int | None, tokens: int | None = 4096) -> int:
        return looked_up_bytes(
            parse_form("f32"),
            65_536,
            256,
            kind="embedding",
            coefficients=COEFFICIENTS,
            context_tokens=tokens,
            named_rows=named,
        )

    assert touched(None) == touched(65_536)
    assert touched(0) == 0
    assert touched(512, None) == 512 * 256 * 4
    assert touched(512) <= 512 * 256 * 4 < touched(65_536)
