"""`golden.safetensors`: fixed prompts and texts, and what the reference makes of them, for the acceptance test.

prompt.N.ids, .logits, .greedy, .gaps    see `GoldenPrompt`
text.N.bytes, .ids, .plain, .decoded     see `GoldenText`
context.N.ids, .logits, .past            see `GoldenContext`
context.left_out                         lengths that a prompt should pass too and none here does, where there are any
stops                                    the tokens at which a generation ends
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from packager.errors import ArtifactError


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


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenContext:
    """Token ids of a long prompt and the logits (vocabulary,) after its last. `past` is the length of the configuration
    that it passes, 0 for the prompt that fills the context."""

    ids: Sequence[int]
    logits: NDArray[np.float32]
    past: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenContexts:
    """Long prompts, and the lengths of the configuration that are too long to be passed by one."""

    prompts: Sequence[GoldenContext]
    left_out: Sequence[int] = ()

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As they lie in the file."""
        found: dict[str, NDArray[Any]] = {}
        if self.left_out:
            found["context.left_out"] = np.array(self.left_out, np.int32)
        for number, prompt in enumerate(self.prompts):
            found |= {
                f"context.{number}.ids": np.array(prompt.ids, np.int32),
                f"context.{number}.logits": prompt.logits,
                f"context.{number}.past": np.array([prompt.past], np.int32),
            }
        return found


def write_golden_file(
    path: Path,
    prompts: Sequence[GoldenPrompt],
    texts: Sequence[GoldenText],
    stops: Sequence[int],
    contexts: GoldenContexts,
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
    save_file(tensors | contexts.tensors(), path)


def has_contexts(path: Path) -> bool:
    """Whether a golden file holds long prompts; those of earlier versions do not. ArtifactError where it is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            return "context.0.ids" in file.keys()  # noqa: SIM118  the file is no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): build the bundle again") from error


def with_contexts(path: Path, contexts: GoldenContexts, out: Path) -> None:
    """Write what the golden file at `path` holds, and `contexts` with it, to `out`."""
    save_file(load_file(path) | contexts.tensors(), out)
