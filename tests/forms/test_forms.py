"""Labels of forms, and their exact bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.forms.blocks import BITS, BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, form_bytes, form_nodes, has_kernels, parse_form
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
