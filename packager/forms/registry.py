"""Every form by its label, and what follows from any of them: bytes, graph nodes, whether a device has kernels.

A new form of codes is a class in a file of its own and one more entry in `FORMS`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from packager.errors import ArtifactError
from packager.forms.base import WeightForm
from packager.forms.blocks import BlockForm
from packager.forms.codes import CodesForm
from packager.forms.drawing import NodeCount
from packager.forms.factored import FACTOR_GRAMMAR, FactoredForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.split import SplitForm

Form = FloatForm | CodesForm | LowRankForm | PivotForm
"""Any form, by how one is made of a matrix: kept, rounded to codes, or taken apart into factors in one of two ways."""
FORMS: tuple[type[Form], ...] = (FloatForm, BlockForm, SplitForm, LowRankForm, PivotForm)
"""Every class of forms."""


@functools.lru_cache(maxsize=1 << 12)
def parse_form(label: str) -> Form:
    """The form a label names: "f32", "f16", "q4g64", "q2g32z", "q6g64", "r64.q8g32", "p100.f32"."""
    for kind in FORMS:
        if (form := kind.parse(label)) is not None:
            return form
    factored = [kind.grammar for kind in FORMS if issubclass(kind, FactoredForm)]
    plain = [kind.grammar for kind in FORMS if not issubclass(kind, FactoredForm)]
    raise ArtifactError(
        f"form {label!r} is unknown: expected {', '.join(plain)}, or two factors of rank n as {' or '.join(factored)} "
        f"before {FACTOR_GRAMMAR}"
    )


@functools.lru_cache(maxsize=1 << 14)
def form_bytes(form: WeightForm, rows: int, cols: int) -> int:
    """Bytes of all tensors of a (rows, cols) matrix in `form`, as they lie in the file."""
    return sum(spec.bytes for spec in form.tensors(rows, cols).values())


@functools.lru_cache(maxsize=1 << 12)
def form_nodes(form: WeightForm) -> int:
    """Graph nodes that multiply by a matrix in `form`, of whatever shape."""
    count = NodeCount()
    form.draw_product(count, None, 1, 1)
    return count.nodes


def has_kernels(form: WeightForm, bits: Sequence[int]) -> bool:
    """Whether a runtime with kernels for codes of `bits` bits multiplies by `form` in codes; float runs everywhere."""
    return all(kernel.fast and kernel.bits in bits for kernel in form.kernels)
