"""A vocabulary cut by rows, and sums of two codes: the graph computes what torch computes from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from test_surgery import Skeleton, check, export

from packager.forms.blocks import BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.registry import form_bytes, parse_form
from packager.forms.split import SplitForm
from packager.scoremap.model import Unit
from packager.scoring.curvature.moments import Curvature
from packager.scoring.curvature.options import score_unit
from packager.scoring.rounding import feedback, round_to, values
from packager.source.unit_weights import Source, find_sources

ROWS = 2304


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    model = random_model("llama", vocab_size=ROWS, tie_word_embeddings=request.param)
    return export(model, tmp_path_factory.mktemp("cut") / "skeleton")


def vocabulary_units(skeleton: Skeleton) -> list[Unit]:
    return [source.unit for source in skeleton.sources if source.unit.kind != "linear"]


def test_a_large_vocabulary_is_cut_into_four_units_that_cover_it(cut: Skeleton) -> None:
    units = vocabulary_units(cut)
    for matrix in {unit.matrix for unit in units}:
        parts = [unit for unit in units if unit.matrix == matrix]
        assert [(unit.start, unit.start + unit.rows) for unit in parts] == [
            (0, 192),
            (192, 768),
            (768, 1536),
            (1536, ROWS),
        ]
        assert [unit.name for unit in parts] == [
            f"{matrix}[0:192]",
            f"{matrix}[192:768]",
            f"{matrix}[768:1536]",
            f"{matrix}[1536:2304]",
        ]


def by_part(forms: dict[int, str]) -> Callable[[Source], str]:
    return lambda source: "q8g32" if source.unit.kind == "linear" else forms[source.unit.start]


@pytest.mark.parametrize(
    "forms",
    [
        {0: "q8g64", 192: "q4g32z", 768: "q4g64", 1536: "q4g32z"},
        {0: "f32", 192: "q8g32", 768: "q4g32z", 1536: "q6g64"},
        {0: "q4g64z", 192: "q4g64z", 768: "f32", 1536: "f32"},
    ],
    ids=lambda forms: "-".join(forms.values()),
)
def test_parts_of_a_vocabulary_may_take_different_forms(cut: Skeleton, forms: dict[int, str], tmp_path: Path) -> None:
    check(cut, by_part(forms), tmp_path)


def test_every_part_is_looked_up_by_tokens_of_its_own(
    cut: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The edges of every part, so that an index off by one would take a row of the neighbour.
    edges = np.array([0, 1, 191, 192, 193, 767, 768, 769, 1535, 1536, 2303, 5, 2000, 400])
    monkeypatch.setattr("test_surgery.IDS", edges)
    monkeypatch.setattr("test_surgery.torch_logits.__defaults__", (edges,))
    check(cut, by_part({0: "q8g64", 192: "q4g32z", 768: "q4g64z", 1536: "q8g32"}), tmp_path)
    (tmp_path / "split").mkdir()
    check(cut, by_part({0: "q8g64", 192: "q6g64", 768: "q4g64z", 1536: "q6g32"}), tmp_path / "split")


def test_sources_of_a_cut_vocabulary_share_one_module(cut: Skeleton) -> None:
    sources = [source for source in cut.sources if source.unit.kind != "linear"]
    whole = cut.model.get_submodule(sources[0].module).weight
    assert torch.equal(
        torch.cat([source.weight(cut.model) for source in sources if source.module == sources[0].module]), whole
    )


def test_split_codes_lie_between_four_and_eight_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    weights, inputs = torch.randn(48, 128, generator=generator), torch.randn(512, 128, generator=generator)
    hessian = inputs.T @ inputs / 512
    unit = Unit(name="some", kind="linear", rows=48, cols=128, matrix="some")
    curvature = Curvature(
        pairs=((hessian, torch.eye(48)),), rounding=hessian, noise={block: torch.zeros(128) for block in BLOCKS}
    )
    scored = {item.option.form.label: item for item in score_unit(unit, weights, curvature, quick=False)}
    total, single = scored["q6g64"], scored["q4g64z"]
    assert isinstance(total.option.form, SplitForm)
    assert total.option.loss_nats < single.option.loss_nats / 8
    assert single.option.bytes < total.option.bytes < scored["q8g64"].option.bytes
    assert total.option.bytes == form_bytes(total.option.form, 48, 128)
    rebuilt = total.option.form.dequantize(total.tensors, 48, 128)
    four = parse_form("q4g64z")
    assert isinstance(four, BlockForm)
    coarse = values(next(round_to(weights, [four], feedback(hessian))), four)
    assert np.abs(rebuilt - weights.numpy()).mean() < float((coarse - weights).abs().mean()) / 2


def test_a_small_vocabulary_stays_whole() -> None:
    model = random_model("llama")
    from packager.graph.skeleton import Matrix

    matrices = [
        Matrix(
            name=f"model.layers.{layer}.{block}.{role}",
            rows=model.get_submodule(f"model.layers.{layer}.{owner}.{role}").weight.shape[0],
            cols=cols,
        )
        for layer in range(2)
        for block, owner, role, cols in [
            *(("attn", "self_attn", role, 64) for role in ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", "mlp", "gate_proj", 64),
            ("mlp", "mlp", "up_proj", 64),
            ("mlp", "mlp", "down_proj", 104),
        ]
    ]
    sources = find_sources(
        [*matrices, Matrix(name="model.embed_tokens", rows=384, cols=64), Matrix(name="lm_head", rows=384, cols=64)],
        model,
    )
    assert [source.unit.name for source in sources if source.unit.kind != "linear"] == ["lm_head"]
