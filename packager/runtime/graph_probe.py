"""Logits of a decoder on the runtime, in a process of its own: python -P -m packager.runtime.graph_probe FOLDER

FOLDER holds a bundle's graph and configuration, and `prompts.npz` with token ids under any names. For each prompt the
last token's logits go to `logits.npz` twice: of the prompt alone, and of one token more that is decoded after it. A
runtime that crashes takes this process with it and no other.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from packager.runtime.device_check import phase

PROMPTS_FILE, LOGITS_FILE = "prompts.npz", "logits.npz"


def last_logits(og: Any, model: Any, ids: Any) -> tuple[Any, Any]:
    """Logits (vocabulary,) after all of `ids` but the last, and after the last as one decoded token."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 1, do_sample=False)
    generator = og.Generator(model, params)
    found = []
    for piece in (ids[:-1], ids[-1:]):
        generator.append_tokens(np.asarray(piece, np.int32))
        # The buffer is the generator's own: the next run writes over it.
        found.append(np.asarray(generator.get_logits()).reshape(-1).astype(np.float32))
    return found[0], found[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    import onnxruntime_genai as og

    phase("load")
    model = og.Model(str(folder))
    logits = {}
    with np.load(folder / PROMPTS_FILE) as prompts:
        for name in prompts.files:
            phase(name)
            logits[f"{name}.prefill"], logits[f"{name}.decode"] = last_logits(og, model, prompts[name])
    np.savez(folder / LOGITS_FILE, **logits)


if __name__ == "__main__":
    main()
