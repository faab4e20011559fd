"""What the process of one bundle holds after each step: python -P -m packager.runtime.memory_probe BUNDLE

Does what the device's acceptance test does for its memory, in a process as small as that one's: load, tokenizer, the
prompt in BUNDLE/prompt.npy, some tokens more. Prints one line of JSON, bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from packager.runtime.device_check import memory, phase

NEW_TOKENS = 32
PROMPT_FILE = "prompt.npy"


def heap_in_use() -> int | None:
    """Bytes that glibc's malloc has given out; None where the C library cannot say."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in [
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            ]
        ]

    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    ask.restype = Info
    info = ask()
    return int(info.uordblks + info.hblkhd)


def probe(bundle: Path) -> dict[str, Any]:
    """Memory after each step, and the bytes that malloc gave out for the tokenizer."""
    import numpy as np
    import onnxruntime_genai as og

    steps = {"start": memory()}
    phase("load")
    model = og.Model(str(bundle))
    steps["load"] = memory()
    before = heap_in_use()
    phase("tokenizer")
    tokenizer = og.Tokenizer(model)
    after = heap_in_use()
    steps["tokenizer"] = memory()
    phase("prefill")
    generator = og.Generator(model, og.GeneratorParams(model))
    ids = np.load(bundle / PROMPT_FILE)
    generator.append_tokens(ids)
    generator.get_logits()
    phase("decode")
    for _ in range(NEW_TOKENS):
        if generator.is_done():
            break
        generator.generate_next_token()
    tokenizer.decode(generator.get_sequence(0))
    steps["end"] = memory()
    heap = None if before is None or after is None else after - before
    return {"steps": steps, "tokenizer_heap_bytes": heap}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    print(json.dumps(probe(parser.parse_args().bundle)))


if __name__ == "__main__":
    main()
