"""What a scoring method works on: the model with its units, the text, and where unfinished work is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from packager.progress import Progress
from packager.scoremap.settings import ScoreSettings
from packager.scoring.workspace import Workspace
from packager.source.calibration_text import CalibrationText
from packager.source.checkpoint import Checkpoint
from packager.source.tokenizer_check import RuntimeTokenizer
from packager.source.unit_weights import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A checkpoint as it was read: its configuration, its tokenizer and the runtime's, its weights on their device,
    and their hash.

    In a context beyond `whole_prompt_tokens` its graph is right only for prompts in one piece, 0 where it always is.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    runtime_tokenizer: RuntimeTokenizer
    model: torch.nn.Module
    sha256: str
    whole_prompt_tokens: int = 0


class Stopwatch:
    """Seconds by phase; what is between two laps belongs to the phase that the second one names."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """`phase` took all the time since the last lap."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """By phase, in the order of their first laps, to a thousandth."""
        return {phase: round(taken, 3) for phase, taken in self._seconds.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """The exported graph without weights: where it lies, its nodes, and the units with where their weights are."""

    graph: Path
    nodes: int
    sources: Sequence[Source]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Everything at hand. `blocks` are the elements of an input that kernels of the forms tried round together, none
    where kernels multiply in float."""

    subject: Subject
    text: CalibrationText
    skeleton: Skeleton
    blocks: Sequence[int]
    settings: ScoreSettings
    work: Workspace
    progress: Progress
    stopwatch: Stopwatch

    @property
    def model(self) -> torch.nn.Module:
        """The source model; whoever changes it puts it back."""
        return self.subject.model

    @property
    def sources(self) -> Sequence[Source]:
        """The units, in the graph's order."""
        return self.skeleton.sources

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def heldout(self) -> torch.Tensor:
        """Windows (n, length) to measure losses on."""
        return first_half(self.text.heldout) if self.settings.quick else self.text.heldout


def first_half(windows: torch.Tensor) -> torch.Tensor:
    """At least one of them. Divergences, far less noisy than rises of the loss, need no more windows."""
    return windows[: -(-len(windows) // 2)]
