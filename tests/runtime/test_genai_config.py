"""The runtime's configuration: what is bounded, and that all else stays as the exporter wrote it."""

from __future__ import annotations

from packager.profile import FLOAT, INT8
from packager.runtime.genai_config import GenaiBounds, bounded_config

EXPORTED = {
    "model": {"decoder": {"filename": "model.onnx", "session_options": {"log_id": "x"}}, "context_length": 8192},
    "search": {"max_length": 8192, "top_k": 50},
}


def bounds(*, kv_cache: str, threads: int) -> GenaiBounds:
    return GenaiBounds(
        graph_file="onnx/model_q4.onnx", context_tokens=512, chunk_tokens=128, kv_cache=kv_cache, threads=threads
    )


def test_a_float_cache_and_the_runtimes_threads_leave_the_session_alone() -> None:
    assert bounded_config(EXPORTED, bounds(kv_cache=FLOAT, threads=0)) == {
        "model": {"decoder": {"filename": "onnx/model_q4.onnx", "session_options": {"log_id": "x"}}}
        | {"context_length": 512},
        "search": {"max_length": 512, "top_k": 50, "chunk_size": 128},
    }


def test_an_int8_cache_goes_without_a_memory_pattern_and_threads_are_said() -> None:
    session = bounded_config(EXPORTED, bounds(kv_cache=INT8, threads=3))["model"]["decoder"]["session_options"]
    assert session == {"log_id": "x", "enable_mem_pattern": False, "intra_op_num_threads": 3}


def test_what_was_exported_is_not_changed() -> None:
    bounded_config(EXPORTED, bounds(kv_cache=INT8, threads=3))
    assert EXPORTED["search"] == {"max_length": 8192, "top_k": 50}
    assert EXPORTED["model"]["decoder"]["session_options"] == {"log_id": "x"}  # type: ignore[index]
