"""One process of one runtime: load, prefill a prompt, decode at that depth. Prints one line of JSON: bytes, tokens/s.

    python -P runtime_probe.py genai|llama MODEL IDS.json NEW THREADS MAX_LENGTH CHUNK_SIZE

`genai` opens a folder for onnxruntime-genai, `llama` a GGUF file for llama-cpp-python. MAX_LENGTH 0 leaves the context
to the model's own settings, CHUNK_SIZE 0 the chunks of the prompt. It needs the runtime and numpy and nothing of this
project, so that any interpreter can run it. `against_runtimes.py` and `settings.py` start it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def genai(
    model_path: str, ids: list[int], new: int, threads: int, max_length: int, chunk_size: int
) -> tuple[float, float]:
    """Seconds of prefill and of `new` decoded tokens."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(model_path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    if chunk_size:
        config.overlay(json.dumps({"search": {"chunk_size": chunk_size}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)
    params = og.GeneratorParams(model)
    params.set_search_options(
        min_length=len(ids) + new, do_sample=False, **({"max_length": max_length} if max_length else {})
    )
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(np.array(ids, np.int32))
    generator.get_logits()
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new):
        generator.generate_next_token()
    decode = time.perf_counter() - start
    tokenizer.decode(generator.get_sequence(0)[-new:])
    return prefill, decode


def llama(
    model_path: str, ids: list[int], new: int, threads: int, max_length: int, chunk_size: int
) -> tuple[float, float]:
    """The same with llama-cpp-python at its defaults."""
    # By name: the project does not depend on it, and its types need not be there.
    llama_cpp = importlib.import_module("llama_cpp")
    pieces = {"n_batch": chunk_size} if chunk_size else {}
    model: Any = llama_cpp.Llama(
        model_path, n_ctx=max_length, n_threads=threads, n_threads_batch=threads, verbose=False, **pieces
    )
    start = time.perf_counter()
    model.eval(ids)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new):
        model.eval([model.sample(temp=0.0)])
    return prefill, time.perf_counter() - start


def main() -> None:
    kind, model_path, ids_path, new, threads, max_length, chunk_size = sys.argv[1:]
    ids = json.loads(Path(ids_path).read_text(encoding="utf-8"))
    prefill, decode = {"genai": genai, "llama": llama}[kind](
        model_path, ids, int(new), int(threads), int(max_length), int(chunk_size)
    )
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    peak = next(int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:")
    figures = {
        "peak_bytes": peak,
        "prefill_tokens_per_second": len(ids) / prefill,
        "decode_tokens_per_second": int(new) / decode,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
