"""What a plan predicts of memory, as `plan.json` and a bundle's manifest hold it."""

from __future__ import annotations

from dataclasses import dataclass

from packager.errors import ArtifactError
from packager.io.records import Count
from packager.memory.model import MemoryEstimate


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedMemory:
    """The process's peak, the phase in which it falls, and the terms of every phase: phase → term → bytes.

    ArtifactError where `peak_phase` is none of the phases.
    """

    peak_bytes: Count
    peak_phase: str
    phases: dict[str, dict[str, Count]]

    def __post_init__(self) -> None:
        if self.peak_phase not in self.phases:
            raise ArtifactError(
                f"predicted memory: peak_phase {self.peak_phase!r} is not one of its phases "
                f"({', '.join(self.phases) or 'none'}): the file is damaged, plan again"
            )

    @property
    def terms(self) -> dict[str, int]:
        """The terms that sum up to the peak: term → bytes."""
        return self.phases[self.peak_phase]


def predicted_memory(estimate: MemoryEstimate) -> PredictedMemory:
    """An estimate as it is kept."""
    return PredictedMemory(**estimate.to_dict())
