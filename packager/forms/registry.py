"""The forms a weight matrix can be stored in, and exactly how many bytes each takes.

A form is what the runtime's kernels accept: float, blocks of 2, 4 or 8 bits with one float32 scale each
(`MatMulNBits`, `GatherBlockQuantized`), or two low-rank factors in float or in blocks.

Shapes: a matrix W has `rows` = N outputs and `cols` = K inputs, y = W x. Blocks run along K.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from packager.errors import ArtifactError

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
KERNEL_BLOCKS = {2: (32, 64, 128), 4: BLOCKS, 8: BLOCKS}
"""bits → blocks that ONNX Runtime's CPU has kernels for. It multiplies by others too, but turns them into floats at
every run: one row of activations then takes a hundred times as long (benchmarks/kernels.py)."""
_FLOATS = {"f32": ("float32", 4), "f16": ("float16", 2)}
_BLOCKS_LABEL = re.compile(r"q([248])g(16|32|64|128|256)(z?)")
_SPLIT_LABEL = re.compile(r"q6g(16|32|64|128|256)")
_FACTORS_LABEL = re.compile(r"([rp])([1-9][0-9]*)\.(f32|f16|q[248]g(?:16|32|64|128|256)z?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One stored tensor: `dtype` as numpy spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        count = 1
        for side in self.shape:
            count *= side
        return count * {"uint8": 1, "float16": 2, "float32": 4, "int32": 4}[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatForm:
    """The matrix itself. `label` is "f32" or "f16"."""

    label: str

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`weight` of shape (rows, cols)."""
        return {"weight": TensorSpec(dtype=_FLOATS[self.label][0], shape=(rows, cols))}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm:
    """Codes of `bits` bits in blocks of `block` along K, a float32 scale for each block.

    With `zeros` each block also has a zero point of `bits` bits; without, it is 2^(bits-1).
    Value = (code - zero point) * scale. K is padded up to whole blocks.
    """

    bits: int
    block: int
    zeros: bool

    @property
    def label(self) -> str:
        """The form's name, which parse_form reads."""
        return f"q{self.bits}g{self.block}{'z' if self.zeros else ''}"

    def blocks(self, cols: int) -> int:
        """Blocks in a row of `cols` elements."""
        return -(-cols // self.block)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`codes` (rows, blocks, block·bits/8), `scales` (rows, blocks), and `zeros` (rows, ⌈blocks·bits/8⌉)."""
        blocks = self.blocks(cols)
        specs = {
            "codes": TensorSpec(dtype="uint8", shape=(rows, blocks, self.block * self.bits // 8)),
            "scales": TensorSpec(dtype="float32", shape=(rows, blocks)),
        }
        if self.zeros:
            specs["zeros"] = TensorSpec(dtype="uint8", shape=(rows, -(-blocks * self.bits // 8)))
        return specs


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankForm:
    """W ≈ up · down with up (rows, rank) and down (rank, cols), both stored as `factors`."""

    rank: int
    factors: FloatForm | BlockForm

    @property
    def label(self) -> str:
        """The form's name, which parse_form reads."""
        return f"r{self.rank}.{self.factors.label}"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The tensors of both factors, named `down.…` and `up.…`."""
        down = self.factors.tensors(self.rank, cols)
        up = self.factors.tensors(rows, self.rank)
        return {f"down.{name}": spec for name, spec in down.items()} | {f"up.{name}": spec for name, spec in up.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PivotForm:
    """W ≈ P [I; rest] base: `base` (rank, cols) stands for as many of W's own rows, `rest` (rows - rank, rank) makes
    the others of them, `order` says which: row i of W is row order[i] of [I; rest] base.

    It has rank · (rows + cols - rank) elements: unlike two factors, fewer than W at every rank.
    """

    rank: int
    factors: FloatForm | BlockForm

    @property
    def label(self) -> str:
        """The form's name, which parse_form reads."""
        return f"p{self.rank}.{self.factors.label}"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The tensors of both factors, named `base.…` and `rest.…`, and `order` (rows,)."""
        if self.rank >= rows:
            raise ArtifactError(f"form {self.label!r}: its rank is not below the {rows} rows of the matrix")
        parts = {
            "base": self.factors.tensors(self.rank, cols),
            "rest": self.factors.tensors(rows - self.rank, self.rank),
        }
        named = {f"{part}.{name}": spec for part, specs in parts.items() for name, spec in specs.items()}
        return named | {"order": TensorSpec(dtype="int32", shape=(rows,))}


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitForm:
    """Codes of 6 bits, which no kernel has, cut into their upper 4 and lower 2 bits: a kernel reads each, and four
    times the one product plus the other is that of the whole. The two share one float32 scale for each block, so the
    whole costs what 6-bit codes would cost. The zero point is 34, the kernels' own 8 and 2 put together.
    """

    block: int

    @property
    def label(self) -> str:
        """The form's name, which parse_form reads."""
        return f"q6g{self.block}"

    @property
    def high(self) -> BlockForm:
        """How the upper bits are read."""
        return BlockForm(bits=4, block=self.block, zeros=False)

    @property
    def low(self) -> BlockForm:
        """How the lower bits are read."""
        return BlockForm(bits=2, block=self.block, zeros=False)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`high` and `low`, the codes of each, and the `scales` of both."""
        high, low = self.high.tensors(rows, cols), self.low.tensors(rows, cols)
        return {"high": high["codes"], "low": low["codes"], "scales": low["scales"]}


Form = FloatForm | BlockForm | LowRankForm | PivotForm | SplitForm


@functools.lru_cache(maxsize=1 << 12)
def parse_form(label: str) -> Form:
    """The form a label names: "f32", "f16", "q4g64", "q2g32z", "q6g64", "r64.q8g32", "p100.f32"."""
    if label in _FLOATS:
        return FloatForm(label=label)
    if match := _BLOCKS_LABEL.fullmatch(label):
        return BlockForm(bits=int(match.group(1)), block=int(match.group(2)), zeros=bool(match.group(3)))
    if match := _FACTORS_LABEL.fullmatch(label):
        rank, factors = int(match.group(2)), parse_form(match.group(3))
        assert isinstance(factors, FloatForm | BlockForm)
        if isinstance(factors, BlockForm) and rank % factors.block:
            raise ArtifactError(f"form {label!r}: rank {rank} is not a multiple of block {factors.block}")
        return (
            LowRankForm(rank=rank, factors=factors) if match.group(1) == "r" else PivotForm(rank=rank, factors=factors)
        )
    if match := _SPLIT_LABEL.fullmatch(label):
        return SplitForm(block=int(match.group(1)))
    raise ArtifactError(
        f"form {label!r} is unknown: expected f32, f16, q<bits>g<block>[z], q6g<block>, or two factors of rank n as "
        f"r<n>. or p<n>. before f32, f16 or "
        "q<bits>g<block>[z]"
    )


@functools.lru_cache(maxsize=1 << 14)
def form_bytes(form: Form, rows: int, cols: int) -> int:
    """Bytes of all tensors of a (rows, cols) matrix in `form`, as they lie in the file."""
    return sum(spec.bytes for spec in form.tensors(rows, cols).values())


def activation_block(form: Form) -> int | None:
    """Elements of an input that a form's kernels round to 8 bits together; None where they multiply in float."""
    match form:
        case BlockForm(block=block) | SplitForm(block=block):
            return block
        case LowRankForm(factors=BlockForm(block=block)) | PivotForm(factors=BlockForm(block=block)):
            return block
    return None


def kernels_of(form: Form) -> tuple[BlockForm, ...]:
    """The codes that a form's products read, one for each kernel; none for float."""
    match form:
        case BlockForm():
            return (form,)
        case LowRankForm(factors=BlockForm() as factors) | PivotForm(factors=BlockForm() as factors):
            return (factors,)
        case SplitForm():
            return (form.high, form.low)
    return ()


def has_kernels(form: Form, bits: Sequence[int]) -> bool:
    """Whether a runtime with kernels for codes of `bits` bits multiplies by `form` in codes; float runs everywhere."""
    return all(codes.bits in bits and codes.block in KERNEL_BLOCKS[codes.bits] for codes in kernels_of(form))


def form_nodes(form: Form) -> int:
    """Graph nodes that multiply by a matrix in `form`."""
    match form:
        case LowRankForm():
            return 2
        case PivotForm() | SplitForm():
            return 4
    return 1
