"""What forms made of codes share: every element is a code of few bits on the grid of its block.

Value = (code - zero point) · scale, with one float32 scale for each block of `block` elements along K.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Bytes, Floats, TableForm

BLOCKS = (16, 32, 64, 128, 256)
"""Elements that can share a scale."""
_MOST_PADDING = 1.06
_NARROW = 64


class CodesForm(TableForm):
    """Codes of `bits` bits in blocks of `block` along K, K padded up to whole blocks.

    However its bytes lie: rounding asks for the grid and gives codes, the form packs them.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code: it lies from 0 to 2^bits - 1."""

    @property
    @abstractmethod
    def block(self) -> int:
        """Elements that share a scale."""

    @property
    @abstractmethod
    def zeros(self) -> bool:
        """Whether each block has a zero point of its own."""

    @property
    @abstractmethod
    def centre(self) -> int:
        """The zero point of every block where none has its own."""

    @abstractmethod
    def pack(self, codes: Bytes, scales: Floats, zeros: Bytes | None) -> dict[str, NDArray[np.generic]]:
        """The stored tensors of a matrix: codes (N, K), scales (N, blocks), zero points (N, blocks) or None."""

    def blocks(self, cols: int) -> int:
        """Blocks in a row of `cols` elements."""
        return -(-cols // self.block)

    def fills(self, cols: int) -> bool:
        """Whether rows of `cols` elements fill the blocks but for a little; narrow ones always may be tried."""
        return self.block <= _NARROW or self.blocks(cols) * self.block <= _MOST_PADDING * cols

    @property
    def price_class(self) -> str:
        """Codes of as many bits."""
        return f"{self.bits} bits"
