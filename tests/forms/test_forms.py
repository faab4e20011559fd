"""Labels of forms, and their exact bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.forms.base import TableForm
from packager.forms.blocks import BITS, BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.drawing import Kernel
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import FORMS, Form, form_bytes, form_nodes, has_kernels, parse_form
from packager.forms.split import SplitForm

block_forms = st.builds(BlockForm, bits=st.sampled_from(BITS), block=st.sampled_from(BLOCKS), zeros=st.booleans())
float_forms = st.sampled_from([FloatForm(label="f32"), FloatForm(label="f16")])
kinds = st.sampled_from([LowRankForm, PivotForm])
factored = st.builds(
    lambda kind, form, times: kind(rank=form.block * times, factors=form), kinds, block_forms, st.integers(1, 9)
)
float_factored = st.builds(
    lambda kind, form, rank: kind(rank=rank, factors=form), kinds, float_forms, st.integers(1, 999)
)
splits = st.builds(SplitForm, block=st.sampled_from(BLOCKS))
forms = st.one_of(float_forms, block_forms, factored, float_factored, splits)


@given(forms)
def test_labels_name_their_forms(form: Form) -> None:
    assert parse_form(form.label) == form


@pytest.mark.parametrize(
    "label",
    [
        "",
        "f64",
        "q3g32",
        "q4g48",
        "q4g32x",
        "q4g32zz",
        "Q4g32",
        " q4g32",
        "q4g32\n",
        "r0.q4g32",
        "r032.q4g32",
        "r32.f64",
        "r0.f32",
        "p032.f32",
        "p32",
        "p32.p32.f32",
        "f32.p32",
        "r32",
        "r32.r32.q4g32",
        "q4g٣٢",
        "q4g32+f32",
        "r32.q6g32",
        "q6g64z",
        "f32+f32",
    ],
)
def test_unknown_labels_are_refused(label: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_form(label)
    assert str(caught.value) == (
        f"form {label!r} is unknown: expected f32, f16, q<bits>g<block>[z], q6g<block>, "
        "or two factors of rank n as r<n>. or p<n>. before f32, f16 or q<bits>g<block>[z]"
    )


def test_a_rank_is_whole_blocks() -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_form("r48.q4g32z")
    assert str(caught.value) == "form 'r48.q4g32z': rank 48 is not a multiple of block 32"
    assert parse_form("r48.f32") == LowRankForm(rank=48, factors=FloatForm(label="f32"))


@pytest.mark.parametrize("rows", [32, 31])
def test_a_pivot_form_has_fewer_rows_in_its_base_than_in_all(rows: int) -> None:
    with pytest.raises(ArtifactError) as caught:
        form_bytes(parse_form("p32.f32"), rows, 64)
    assert str(caught.value) == f"form 'p32.f32': its rank is not below the {rows} rows of the matrix"


@given(st.integers(2, 2000), st.integers(1, 2000), st.data())
def test_a_pivot_form_is_never_larger_than_the_matrix(rows: int, cols: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows - 1, cols)))
    elements = (form_bytes(parse_form(f"p{rank}.f32"), rows, cols) - 4 * rows) // 4
    assert elements == rank * (rows + cols - rank) <= rows * cols
    assert elements == rows * cols - (rows - rank) * (cols - rank)
    assert 4 * elements < form_bytes(parse_form(f"r{rank}.f32"), rows, cols)


def test_nodes_of_each_form() -> None:
    counts = {"f32": 1, "q4g32": 1, "r32.q4g32": 2, "r7.f32": 2, "q6g64": 4, "p32.q4g32z": 4}
    assert {label: form_nodes(parse_form(label)) for label in counts} == counts


@given(forms, st.integers(9 * 256 + 1, 5000), st.integers(1, 3000))
def test_bytes_are_the_sum_of_the_tensors(form: Form, rows: int, cols: int) -> None:
    assert form_bytes(form, rows, cols) == sum(spec.bytes for spec in form.tensors(rows, cols).values()) > 0


def test_bytes_of_known_shapes() -> None:
    assert form_bytes(parse_form("f32"), 3, 5) == 60
    assert form_bytes(parse_form("f16"), 3, 5) == 30
    # 2 rows of 2 blocks: 16 bytes of codes and a 4-byte scale each
    assert form_bytes(parse_form("q4g32"), 2, 33) == 2 * 2 * (16 + 4)
    # and a byte of two 4-bit zero points for each row
    assert form_bytes(parse_form("q4g32z"), 2, 33) == 2 * 2 * (16 + 4) + 2
    # 3 blocks' zero points of 4 bits take two bytes
    assert form_bytes(parse_form("q4g32z"), 1, 96) == 3 * 20 + 2
    assert form_bytes(parse_form("q2g16z"), 1, 80) == 5 * (4 + 4) + 2
    assert form_bytes(parse_form("r32.q4g32"), 10, 64) == 32 * 2 * 20 + 10 * 20
    # 32 rows of 2 blocks, 8 rows of 1 block, and 40 numbers of the order
    assert form_bytes(parse_form("p32.q4g32"), 40, 64) == 32 * 2 * 20 + 8 * 20 + 40 * 4
    assert form_bytes(parse_form("p7.f16"), 40, 64) == 2 * (7 * 64 + 33 * 7) + 40 * 4
    assert form_bytes(parse_form("q6g32"), 3, 64) == 3 * (48 + 2 * 4)


@given(block_forms, st.integers(1, 1000), st.integers(1, 1000))
def test_fewer_bits_are_never_more_bytes(form: BlockForm, rows: int, cols: int) -> None:
    sizes = [form_bytes(BlockForm(bits=bits, block=form.block, zeros=form.zeros), rows, cols) for bits in BITS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("label", "bits", "runs"),
    [
        ("f32", (), True),
        ("p11.f16", (), True),
        ("q4g256z", (4,), True),
        ("q4g64", (2, 8), False),
        ("q2g32z", (2, 4, 8), True),
        ("q2g128", (2, 4, 8), True),
        ("q2g16", (2, 4, 8), False),
        ("q2g256", (2, 4, 8), False),
        ("q6g128", (2, 4, 8), True),
        ("q6g128", (4, 8), False),
        ("q6g256", (2, 4, 8), False),
        ("r256.q2g256", (2, 4, 8), False),
        ("p16.q2g16", (2, 4, 8), False),
    ],
)
def test_forms_run_where_every_product_has_a_kernel(label: str, bits: tuple[int, ...], runs: bool) -> None:
    assert has_kernels(parse_form(label), bits) == runs


class Named:
    """A drawing that writes down what it is asked for, as text."""

    def __init__(self, nodes: list[str], prefix: str = "") -> None:
        self.nodes, self.prefix = nodes, prefix

    def tensor(self, name: str, *, flat: bool = False) -> str:
        return f"{self.prefix}{name}{' flat' if flat else ''}"

    def part(self, name: str) -> Named:
        return Named(self.nodes, f"{self.prefix}{name}.")

    def constant(self, name: str, number: float) -> str:
        return f"{number:g}"

    def _node(self, text: str) -> str:
        self.nodes.append(text)
        return f"#{len(self.nodes)}"

    def multiply_float(self, name: str, source: str, weight: str) -> str:
        return self._node(f"{source} times {weight}")

    def multiply_blocks(
        self, name: str, source: str, tensors: Sequence[str], kernel: Kernel, rows: int, cols: int
    ) -> str:
        return self._node(f"{source} times {kernel.bits} bits of {', '.join(tensors)}: {rows} by {cols}")

    def look_up_float(self, name: str, indices: str, weight: str) -> str:
        return self._node(f"{indices} in {weight}")

    def look_up_blocks(self, name: str, indices: str, tensors: Sequence[str], kernel: Kernel) -> str:
        return self._node(f"{indices} in {kernel.bits} bits of {', '.join(tensors)}")

    def concat(self, parts: Sequence[str]) -> str:
        return self._node(f"{' beside '.join(parts)}")

    def pick(self, source: str, order: str) -> str:
        return self._node(f"{source} in {order}")

    def cut(self, source: str, count: int) -> str:
        return self._node(f"{count} of {source}")

    def scale(self, source: str, factor: str) -> str:
        return self._node(f"{source} by {factor}")

    def add(self, first: str, second: str) -> str:
        return self._node(f"{first} and {second}")


@pytest.mark.parametrize(
    ("label", "nodes"),
    [
        ("f16", ["x times weight"]),
        ("q4g32z", ["x times 4 bits of codes, scales, zeros: 40 by 48"]),
        ("r7.f32", ["x times down.weight", "#1 times up.weight"]),
        (
            "p32.q8g32",
            [
                "x times 8 bits of base.codes, base.scales: 32 by 48",
                "#1 times 8 bits of rest.codes, rest.scales: 8 by 32",
                "#1 beside #2",
                "#3 in order",
            ],
        ),
        (
            "q6g32",
            [
                "x times 4 bits of high, scales: 40 by 48",
                "x times 2 bits of low, scales: 40 by 48",
                "#1 by 4",
                "#3 and #2",
            ],
        ),
    ],
)
def test_what_a_product_is_drawn_as(label: str, nodes: list[str]) -> None:
    drawing = Named([])
    assert parse_form(label).draw_product(drawing, "x", 40, 48) == f"#{len(nodes)}"
    assert drawing.nodes == nodes


@pytest.mark.parametrize(
    ("label", "cols", "nodes"),
    [
        ("f32", 48, ["i in weight"]),
        ("q8g32", 64, ["i in 8 bits of codes flat, scales"]),
        ("q8g32", 48, ["i in 8 bits of codes flat, scales", "48 of #1"]),
        (
            "q6g32",
            48,
            [
                "i in 4 bits of high flat, scales",
                "i in 2 bits of low flat, scales",
                "#1 by 4",
                "#3 and #2",
                "48 of #4",
            ],
        ),
    ],
)
def test_what_a_lookup_is_drawn_as(label: str, cols: int, nodes: list[str]) -> None:
    form, drawing = parse_form(label), Named([])
    assert isinstance(form, TableForm)
    assert form.draw_lookup(drawing, "i", cols) == f"#{len(nodes)}"
    assert drawing.nodes == nodes


def test_factors_cannot_be_looked_up() -> None:
    assert [kind for kind in FORMS if not issubclass(kind, TableForm)] == [LowRankForm, PivotForm]


@pytest.mark.parametrize(
    ("label", "cols", "fits"), [("q4g64", 65, True), ("q4g128", 600, False), ("q6g128", 576, False)]
)
def test_rows_that_blocks_would_only_pad(label: str, cols: int, fits: bool) -> None:
    assert parse_form(label).fills(cols) == fits
    assert parse_form(label).fills(1280)
