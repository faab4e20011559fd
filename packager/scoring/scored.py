"""What scoring makes: an option of a unit with the tensors that it is stored in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from packager.scoremap.model import Option

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An option and its packed tensors."""

    option: Option
    tensors: Arrays
