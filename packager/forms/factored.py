"""What forms of two factors share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from packager.errors import ArtifactError
from packager.forms.base import WeightForm
from packager.forms.blocks import BlockForm
from packager.forms.drawing import Kernel
from packager.forms.floats import FloatForm

Factor = FloatForm | BlockForm
"""How a factor is stored."""
FACTOR_GRAMMAR = f"{FloatForm.grammar} or {BlockForm.grammar}"
_LABEL = re.compile(r"([a-z])([1-9][0-9]*)\.(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class FactoredForm(WeightForm):
    """W (rows, cols) from two matrices that meet in `rank` elements, both stored as `factors`. A label is the class's
    `letter`, the rank and the factors' label: "r64.q8g32"."""

    letter: ClassVar[str]

    rank: int
    factors: Factor

    @property
    def label(self) -> str:
        """Such as "r64.q8g32", "p100.f32"."""
        return f"{self.letter}{self.rank}.{self.factors.label}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """Such as "r64.q8g32", "p100.f32". The rank is whole blocks of the factor that runs along it."""
        match = _LABEL.fullmatch(label)
        if match is None or match[1] != cls.letter:
            return None
        rank, factors = int(match[2]), FloatForm.parse(match[3]) or BlockForm.parse(match[3])
        if factors is None:
            return None
        block = factors.activation_block
        if block is not None and rank % block:
            raise ArtifactError(f"form {label!r}: rank {rank} is not a multiple of block {block}")
        return cls(rank=rank, factors=factors)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """That of the factors, which both products read."""
        return self.factors.kernels

    @property
    def price_class(self) -> str:
        """Both kinds of factors alike."""
        return "low rank"
