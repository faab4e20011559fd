"""`golden.safetensors`: fixed prompts and texts, and what the reference makes of them, for the acceptance test.

prompt.N.ids, .logits, .greedy, .gaps    see `GoldenPrompt`
text.N.bytes, .ids, .plain, .decoded     see `GoldenText`
stops                                    the tokens at which a generation ends
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenPrompt:
    """Token ids of a prompt, the logits (vocabulary,) after its last, the tokens that follow greedily, and at each of
    them the gap between the two best logits."""

    ids: Sequence[int]
    logits: NDArray[np.float32]
    greedy: Sequence[int]
    gaps: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenText:
    """A text, its token ids, the `plain` ones without special tokens, and the text that these decode to."""

    text: str
    ids: Sequence[int]
    plain: Sequence[int]
    decoded: str


def write_golden_file(
    path: Path, prompts: Sequence[GoldenPrompt], texts: Sequence[GoldenText], stops: Sequence[int]
) -> None:
    """Write the file."""
    tensors: dict[str, NDArray[Any]] = {"stops": np.array(stops, np.int32)} if stops else {}
    for number, prompt in enumerate(prompts):
        tensors |= {
            f"prompt.{number}.ids": np.array(prompt.ids, np.int32),
            f"prompt.{number}.logits": prompt.logits,
            f"prompt.{number}.greedy": np.array(prompt.greedy, np.int32),
            f"prompt.{number}.gaps": np.array(prompt.gaps, np.float32),
        }
    for number, text in enumerate(texts):
        tensors |= {
            f"text.{number}.bytes": np.frombuffer(text.text.encode(), np.uint8),
            f"text.{number}.ids": np.array(text.ids, np.int32),
            f"text.{number}.plain": np.array(text.plain, np.int32),
            f"text.{number}.decoded": np.frombuffer(text.decoded.encode(), np.uint8),
        }
    save_file(tensors, path)
