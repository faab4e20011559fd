"""Skeleton and surgery: what ONNX Runtime computes from a written graph is what torch computes from the same
weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import Pico, random_model
from safetensors.numpy import save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from packager.bundle.folder import GRAPH_FILE
from packager.errors import ExportError, UnsupportedModelError
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, parse_form
from packager.forms.split import SplitForm
from packager.graph.skeleton import export_skeleton
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.safetensors_ranges import Region, read_header
from packager.runtime.sessions import full_logits_session, run_window
from packager.scoring.rounding import feedback, packed, round_to
from packager.source.checkpoint import vectors
from packager.source.unit_weights import Source, find_sources

IDS = np.random.default_rng(3).integers(2, 384, 100)
"""Longer than the sliding windows of Mistral and Gemma 3."""
FLOAT_KERNELS = GraphOptions(context_tokens=128, accuracy_level=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """An exported model: its graph, and which part of the torch model each matrix is."""

    folder: Path
    model: torch.nn.Module
    sources: list[Source]


def export(model: torch.nn.Module, folder: Path) -> Skeleton:
    matrices, nodes = export_skeleton(model.config, dict(vectors(model)), "cpu", folder)
    assert nodes > 0
    return Skeleton(folder=folder, model=model, sources=find_sources(matrices, model))


@pytest.fixture(scope="session")
def skeletons(tmp_path_factory: pytest.TempPathFactory, picos: Callable[[str], Pico]) -> Callable[[str], Skeleton]:
    made: dict[str, Skeleton] = {}

    def get(name: str) -> Skeleton:
        if name not in made:
            made[name] = export(picos(name).model, tmp_path_factory.mktemp("skeleton") / name)
        return made[name]

    return get


def quantise(form: Form, weights: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of `weights` in `form`, rounded to nearest: any rounding does here."""
    rows, cols = weights.shape
    match form:
        case FloatForm():
            return {"weight": weights.astype(np.float32)}
        case LowRankForm():
            u, s, v = np.linalg.svd(weights, full_matrices=False)
            up, down = (u * s)[:, : form.rank], v[: form.rank]
            pad = form.rank - down.shape[0]
            up, down = np.pad(up, ((0, 0), (0, pad))), np.pad(down, ((0, pad), (0, 0)))
            parts = {f"down.{key}": value for key, value in quantise(form.factors, down).items()}
            return parts | {f"up.{key}": value for key, value in quantise(form.factors, up).items()}
        case PivotForm():
            # Any rows do here, even ones that span the others badly; not in their old order.
            rows_in_order = np.random.default_rng(rows).permutation(rows)
            few, others = weights[rows_in_order[: form.rank]], weights[rows_in_order[form.rank :]]
            rest = np.linalg.lstsq(few.T, others.T, rcond=None)[0].T
            parts = {f"base.{key}": value for key, value in quantise(form.factors, few).items()}
            parts |= {f"rest.{key}": value for key, value in quantise(form.factors, rest).items()}
            return parts | {"order": np.argsort(rows_in_order).astype(np.int32)}
        case SplitForm():
            (rounded,) = round_to(torch.from_numpy(weights), [form], feedback(torch.eye(cols)))
            return packed(rounded, form)
    blocks = form.blocks(cols)
    padded = np.pad(weights, ((0, 0), (0, blocks * form.block - cols))).reshape(rows, blocks, form.block)
    top = 2**form.bits - 1
    if form.zeros:
        low, high = np.minimum(padded.min(-1), 0), np.maximum(padded.max(-1), 0)
        scales = np.maximum((high - low) / top, 1e-8)
        zeros = np.clip(np.round(-low / scales), 0, top)
    else:
        scales = np.maximum(np.abs(padded).max(-1) / 2 ** (form.bits - 1), 1e-8)
        zeros = np.full((rows, blocks), 2 ** (form.bits - 1))
    codes = np.clip(np.round(padded / scales[..., None] + zeros[..., None]), 0, top).astype(np.uint8)
    flat = np.ascontiguousarray(codes.reshape(rows, -1)[:, :cols])
    return form.pack(flat, scales.astype(np.float32), zeros.astype(np.uint8) if form.zeros else None)


def place(skeleton: Skeleton, forms: Callable[[Source], str], folder: Path) -> tuple[list[Placement], torch.nn.Module]:
    """Every unit in the form that `forms` names, its bytes in files in `folder`; and a torch model of the same
    weights."""
    model = copy.deepcopy(skeleton.model)
    placements = []
    for number, source in enumerate(skeleton.sources):
        unit, form = source.unit, parse_form(forms(source))
        tensors = quantise(form, source.weight(skeleton.model).numpy())
        path = folder / f"{number}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
        regions = {key: tensor.region for key, tensor in read_header(path)[0].items()}
        placements.append(
            Placement(
                name=unit.name,
                matrix=unit.matrix,
                start=unit.start,
                tied=unit.kind == "tied",
                rows=unit.rows,
                cols=unit.cols,
                form=form,
                regions=regions,
            )
        )
        source.weight(model).copy_(torch.from_numpy(form.dequantize(tensors, unit.rows, unit.cols)))
    return placements, model


def build(
    skeleton: Skeleton, placements: list[Placement], out: Path, options: GraphOptions = FLOAT_KERNELS
) -> Mapping[str, int]:
    (out / "onnx").mkdir(parents=True)
    return write_model(skeleton.folder / "graph.onnx", placements, options, out / GRAPH_FILE)


def torch_logits(model: torch.nn.Module, ids: np.ndarray[Any, Any] = IDS) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return logits


def assert_same_logits(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.5, "logits too flat to tell models apart"
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(np.abs(expected).max()), rtol=0)


def check(skeleton: Skeleton, forms: Callable[[Source], str], folder: Path) -> None:
    placements, model = place(skeleton, forms, folder)
    sizes = build(skeleton, placements, folder / "bundle")
    assert sizes == {item.name: sum(region.length for region in item.regions.values()) for item in placements}
    assert_same_logits(
        torch_logits(model), run_window(full_logits_session(folder / "bundle" / GRAPH_FILE, threads=1), IDS)
    )


def mixed(source: Source) -> str:
    """Forms of every kind over one model; the vocabulary at 4 bits with zero points."""
    if source.unit.kind != "linear":
        return "q4g32z"
    role = source.unit.name.rpartition(".")[2]
    return {
        "q_proj": "q4g32",
        "k_proj": "q8g32",
        "v_proj": "q4g64z",
        "o_proj": "r32.q4g32z",
        "gate_proj": "q2g32",
        "up_proj": "q6g32",
    }.get(role, "q8g128")


def test_float_graph_computes_what_torch_does(pico: Pico, skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    check(skeletons(pico.name), lambda source: "f32", tmp_path)


def test_mixed_forms_compute_what_torch_does(pico: Pico, skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    check(skeletons(pico.name), mixed, tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # tied, untied
@pytest.mark.parametrize("label", ["q4g32z", "q4g64", "q8g32", "q8g32z", "q8g16", "q2g32", "q2g32z", "q2g64z"])
def test_every_unit_in_one_form(name: str, label: str, skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    check(skeletons(name), lambda source: label, tmp_path)


@pytest.mark.parametrize(
    "label", ["r32.q4g32z", "r16.q8g16", "r11.f32", "p16.q4g16z", "p16.q8g16", "p11.f32", "q6g32", "q6g64"]
)
def test_linears_in_two_parts(label: str, skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    check(skeletons("llama"), lambda source: label if source.unit.kind == "linear" else "f32", tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("label", ["q4g64z", "q8g64", "q8g128", "q4g128z", "q2g64"])
def test_rows_of_the_vocabulary_that_are_no_whole_blocks(tied: bool, label: str, tmp_path: Path) -> None:
    model = random_model("llama", hidden_size=96, num_attention_heads=6, tie_word_embeddings=tied)
    check(export(model, tmp_path / "skeleton"), lambda source: label, tmp_path)


def test_float_embedding_beside_a_packed_head(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    check(skeletons("qwen2"), lambda source: "f32" if source.unit.kind == "embedding" else "q4g32z", tmp_path)


def test_kernels_with_8_bit_activations_stay_near(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, model = place(skeletons("llama"), mixed, tmp_path)
    build(skeletons("llama"), placements, tmp_path / "bundle", GraphOptions(context_tokens=128, accuracy_level=4))
    found = run_window(full_logits_session(tmp_path / "bundle" / GRAPH_FILE, threads=1), IDS)
    expected = torch_logits(model)
    assert np.abs(found - expected).mean() < 0.1 * expected.std()
    assert not np.array_equal(found, expected)


def test_tied_table_lies_in_the_file_once(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "q4g32z", tmp_path)
    sizes = build(skeletons("llama"), placements, tmp_path / "bundle")
    data = (tmp_path / "bundle" / f"{GRAPH_FILE}_data").stat().st_size
    tables = 2 * 128 * 8 * 4  # cosines and sines of 128 positions, half of 16 dimensions, float32
    assert sum(sizes.values()) <= data <= sum(sizes.values()) + tables + 64 * (3 * len(placements) + 2)


def test_rotary_tables_are_cut_to_the_context(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("gemma3"), lambda source: "f32", tmp_path)
    build(skeletons("gemma3"), placements, tmp_path / "bundle")
    tables = {
        name: value
        for name, value in ir.load(tmp_path / "bundle" / GRAPH_FILE).graph.initializers.items()
        if name.startswith(("cos", "sin"))
    }
    assert len(tables) == 4  # Gemma 3 turns sliding and full layers at different speeds
    assert {value.const_value.shape[0] for value in tables.values() if value.const_value is not None} == {128}


def test_caches_have_a_width_that_other_loaders_can_read(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    for name, width in (("llama", 16), ("qwen3", 32), ("gemma3", 16)):
        graph = ir.load(skeletons(name).folder / "graph.onnx").graph
        widths = {
            value.shape[3]
            for value in [*graph.inputs, *graph.outputs]
            if value.shape is not None and len(value.shape) == 4
        }
        assert widths == {width}


def test_skeleton_is_weightless(skeletons: Callable[[str], Skeleton]) -> None:
    model = skeletons("llama").model
    matrices = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    assert (skeletons("llama").folder / "graph.onnx").stat().st_size < matrices


def test_a_missing_unit_is_an_error(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "f32", tmp_path)
    kept = [item for item in placements if item.name != "model.layers.1.mlp.up_proj"]
    with pytest.raises(
        ExportError,
        match=r"^graph weights without a unit in the map: \['model\.layers\.1\.mlp\.up_proj\.MatMul\.weight'\]$",
    ):
        build(skeletons("llama"), kept, tmp_path / "bundle")


def test_an_extra_unit_is_an_error(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "f32", tmp_path)
    extra = dataclasses.replace(placements[0], name="model.layers.7.mlp.up_proj", matrix="model.layers.7.mlp.up_proj")
    with pytest.raises(
        ExportError,
        match=(
            r"^unit 'model\.layers\.7\.mlp\.up_proj\.MatMul\.weight' meets no node of the graph: the "
            r"map and its skeleton"
        ),
    ):
        build(skeletons("llama"), [*placements, extra], tmp_path / "bundle")


def test_a_wrong_byte_count_is_an_error(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "f32", tmp_path)
    region = placements[3].regions["weight"]
    short = dataclasses.replace(
        placements[3], regions={"weight": dataclasses.replace(region, length=region.length - 4)}
    )
    name, rows, cols = short.name, short.rows, short.cols
    with pytest.raises(ExportError) as caught:
        build(skeletons("llama"), [*placements[:3], short, *placements[4:]], tmp_path / "bundle")
    assert (
        str(caught.value)
        == f"{name}.weight: expected {4 * rows * cols} bytes for {(rows, cols)}, the store has {4 * rows * cols - 4}"
    )


def test_missing_tensors_are_an_error(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "q4g32z", tmp_path)
    regions = {key: region for key, region in placements[0].regions.items() if key != "zeros"}
    with pytest.raises(ExportError) as caught:
        build(skeletons("llama"), [dataclasses.replace(placements[0], regions=regions)], tmp_path / "bundle")
    expected = "form q4g32z needs tensors ['codes', 'scales', 'zeros'], the store has ['codes', 'scales']"
    assert str(caught.value) == f"{placements[0].name}: {expected}"


def test_a_store_that_ends_early_is_an_error(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("llama"), lambda source: "f32", tmp_path)
    region = placements[0].regions["weight"]
    region.path.write_bytes(region.path.read_bytes()[:-8])
    with pytest.raises(
        ExportError, match=r"0\.safetensors ends before byte \d+: it is cut short, score the model again$"
    ):
        build(skeletons("llama"), placements, tmp_path / "bundle")


def test_an_embedding_cannot_be_low_rank(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("qwen2"), lambda source: "r32.q4g32z", tmp_path)
    with pytest.raises(ExportError, match=r"^model\.embed_tokens: an embedding cannot be stored as r32\.q4g32z$"):
        build(skeletons("qwen2"), placements, tmp_path / "bundle")


def test_regions_anywhere_in_a_file_are_copied(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    """The store's offsets need no alignment."""
    placements, model = place(skeletons("llama"), mixed, tmp_path)
    joined, moved, content = tmp_path / "joined", [], b"odd"
    for item in placements:
        regions = {}
        for key, region in item.regions.items():
            regions[key] = Region(path=joined, offset=len(content), length=region.length)
            content += region.path.read_bytes()[region.offset : region.offset + region.length] + b"!"
        moved.append(dataclasses.replace(item, regions=regions))
    joined.write_bytes(content)
    build(skeletons("llama"), moved, tmp_path / "bundle")
    assert_same_logits(
        torch_logits(model), run_window(full_logits_session(tmp_path / "bundle" / GRAPH_FILE, threads=1), IDS)
    )


def test_same_inputs_write_the_same_graph(skeletons: Callable[[str], Skeleton], tmp_path: Path) -> None:
    placements, _ = place(skeletons("gemma3"), mixed, tmp_path)
    for name in ("one", "two"):
        build(skeletons("gemma3"), placements, tmp_path / name)
    for file in (GRAPH_FILE, f"{GRAPH_FILE}_data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GPT2LMHeadModel, GPT2Config(n_layer=1, n_embd=32, n_head=2)),
        (BloomForCausalLM, BloomConfig(n_layer=1, hidden_size=32, n_head=2)),
    ],
)
def test_an_unsupported_architecture_is_named(kind: Any, config: Any, tmp_path: Path) -> None:
    config.architectures = [kind.__name__]
    with pytest.raises(UnsupportedModelError) as caught:
        export_skeleton(config, dict(vectors(kind(config))), "cpu", tmp_path)
    assert str(caught.value) == (
        f"architecture {kind.__name__} is not one the exporter knows: expected a decoder such as "
        "LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM or Phi3ForCausalLM"
    )


def test_a_missing_vector_is_named(picos: Callable[[str], Pico], tmp_path: Path) -> None:
    model = picos("llama").model
    some = {name: tensor for name, tensor in vectors(model) if name != "model.norm.weight"}
    with pytest.raises(
        UnsupportedModelError, match=r"^the checkpoint has no model\.norm\.weight, which LlamaForCausalLM needs$"
    ):
        export_skeleton(model.config, some, "cpu", tmp_path)


@pytest.mark.parametrize(("name", "windows"), [("mistral", {48}), ("gemma3", {32, -1}), ("llama", {-1})])
def test_layers_slide_where_the_model_says_so(
    name: str, windows: set[int], skeletons: Callable[[str], Skeleton], tmp_path: Path
) -> None:
    placements, _ = place(skeletons(name), mixed, tmp_path)
    build(skeletons(name), placements, tmp_path / "bundle")
    nodes = [node for node in ir.load(tmp_path / "bundle" / GRAPH_FILE).graph if node.op_type == "GroupQueryAttention"]
    assert {node.attributes["local_window_size"].as_int() for node in nodes} == windows
    # Caches of the window's length would bind the graph to one loader.
    assert not any("sliding_window_cache" in node.attributes for node in nodes)
    shapes = {
        str(value.shape[2])
        for value in ir.load(tmp_path / "bundle" / GRAPH_FILE).graph.inputs
        if value.name and value.name.startswith("past") and value.shape
    }
    assert shapes == {"past_sequence_length"}
