"""What a weight matrix is for."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["linear", "head", "embedding", "tied"]
"""`linear`: a matrix of a layer. `head`: multiplied to make logits. `embedding`: looked up. `tied`: one matrix that is
both."""
KINDS: tuple[Kind, ...] = get_args(Kind)
