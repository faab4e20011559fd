"""The 8-bit key/value cache: what the runtime computes with it, what it costs, and when a plan takes it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from test_surgery import FLOAT_KERNELS, IDS, build, export, place, torch_logits

from packager.bundle.folder import GRAPH_FILE
from packager.bundle.opening import open_bundle
from packager.bundle.writer import Recipe, stage, write_manifest
from packager.cli.command import main
from packager.errors import ExportError, InfeasibleBudgetError, ProfileError, UsageError
from packager.graph.kv_cache_codes import LayerScales, cache_facts, quantise_caches
from packager.graph.names import GRAPH_FILE as SKELETON_FILE
from packager.planning.kv_cache_choice import offered
from packager.planning.plan import Plan, Request, chosen
from packager.planning.target import Target
from packager.profile import DeviceProfile, parse_profile
from packager.runtime.sessions import full_logits_session, run_window
from packager.scoremap.folder import MapFolder
from packager.scoremap.opening import OpenedMap, open_map
from packager.scoring.kv_cache_price import measure_steps, pair_norms
from packager.source.kv_cache_rounding import rounding, tap
from packager.validation.reference import load_reference

PROFILE = """\
[device]
memory = "1GiB"
budget = "50%"
threads = 1
[runtime]
chunk_tokens = 32
[context]
tokens = 512
"""


@pytest.fixture(scope="session")
def device() -> DeviceProfile:
    return parse_profile(PROFILE, where="here", name="pico-box")


def grown(path: Path) -> OpenedMap:
    """A pico's map with a cache to speak of: two small layers save less than prefill needs to have one of them in
    floats."""
    loaded = open_map(path)
    return dataclasses.replace(loaded, geometry=dataclasses.replace(loaded.geometry, layers=24, head_dim=128))


def least(loaded: OpenedMap, device: DeviceProfile, cache: str) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        Request(profile=device, budget_bytes=1 << 20, cache=cache).plan(loaded)
    return caught.value.minimum_bytes


def test_the_graph_computes_what_torch_does_with_rounded_keys_and_values(pico: Pico, tmp_path: Path) -> None:
    skeleton = export(pico.model, tmp_path / "skeleton")
    facts = cache_facts(ir.load(skeleton.folder / SKELETON_FILE).graph, "cpu")
    assert not facts.refusal
    assert facts.layers == tuple(range(pico.model.config.num_hidden_layers))
    windows = torch.from_numpy(np.random.default_rng(5).integers(2, 384, (2, 100)))
    steps = measure_steps(pico.model, windows, facts)
    scales: LayerScales = {layer: (keys.numpy(), values.numpy()) for layer, (keys, values) in steps.items()}
    placements, model = place(skeleton, lambda source: "f32", tmp_path)
    build(skeleton, placements, tmp_path / "bundle", dataclasses.replace(FLOAT_KERNELS, cache_scales=scales))
    found = run_window(full_logits_session(tmp_path / "bundle" / GRAPH_FILE, threads=1), IDS)
    exact = torch_logits(model)
    tap(model, rounding(steps))
    rounded = torch_logits(model)
    widened = run_window(full_logits_session(tmp_path / "bundle" / GRAPH_FILE, threads=1, float_kernels=True), IDS)
    assert np.abs(widened - exact).max() < 2e-3 * np.abs(exact).max()
    # A key that lies between two codes may fall to either side: a few logits move by one step's worth.
    assert np.abs(found - rounded).mean() < 0.1 * np.abs(exact - rounded).mean()
    assert np.abs(exact - rounded).mean() < 0.05 * exact.std(), "8 bits lose more than they should"


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen3"])
def test_a_long_prompt_in_chunks_an_answer_and_another_turn_are_torchs(
    name: str, maps: Callable[[str], Path], device: DeviceProfile, tmp_path: Path
) -> None:
    """Past and present are one buffer, which the exporter would not have: every chunk and token must be appended in
    place."""
    import onnxruntime_genai as og

    loaded = open_map(maps(name))
    plan = Request(profile=device, cache="int8", target=Target(fill=True)).plan(loaded)
    assert (plan.cache, plan.prefix) == ("int8", 0)
    bundle = stage(Recipe(source=loaded, plan=plan, profile=device), tmp_path / "bundle")
    write_manifest(bundle)
    assert open_bundle(tmp_path / "bundle") == bundle
    assert bundle.manifest.cache == "int8"
    assert (
        json.loads((tmp_path / "bundle" / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
        is True
    )
    torch_side = load_reference(bundle)
    ids = np.resize(bundle.folder.reference.held_out().windows.reshape(-1), 341).astype(np.int32)
    model = og.Model(str(tmp_path / "bundle"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=360, min_length=360, do_sample=False)
    generator = og.Generator(model, params)
    for turn in (ids[:301], None, None, None, ids[301:], None, None):
        if turn is None:
            generator.generate_next_token()
        else:
            generator.append_tokens(turn)
        found = np.asarray(generator.get_logits()).reshape(-1)
        with torch.no_grad():
            expected = (
                torch_side.model(input_ids=torch.from_numpy(np.array(generator.get_sequence(0)))[None])
                .logits[0, -1]
                .numpy()
            )
        assert np.abs(found - expected).mean() < 0.15 * expected.std()


def test_a_map_holds_steps_and_what_they_cost(maps: Callable[[str], Path]) -> None:
    for name in ("llama", "qwen3"):
        loaded = open_map(maps(name))
        score = loaded.identity.int8_cache
        assert score is not None
        assert score.refusal == ""
        assert 0 < score.loss_nats < 0.01
        scales = MapFolder(root=maps(name)).reference.kv_scales()
        geometry = loaded.geometry
        assert list(scales) == list(range(geometry.layers))
        assert all(
            step.shape == (geometry.kv_heads, geometry.head_dim) and (step > 0).all()
            for pair in scales.values()
            for step in pair
        )


def test_the_better_of_two_plans_wins(maps: Callable[[str], Path], device: DeviceProfile) -> None:
    loaded = grown(maps("llama"))
    ample = Request(profile=device).plan(loaded)
    assert (ample.cache, ample.cache_nats) == ("float", 0.0)  # with room for everything a rounded cache only costs
    assert "with a int8 cache the loss would be" in ample.cache_note
    tight = least(loaded, device, "float")
    both = {
        kind: Request(profile=device, budget_bytes=tight, cache=kind).plan(loaded) for kind in ("float", "int8", "auto")
    }
    assert both["int8"].loss_nats < both["float"].loss_nats
    assert both["int8"].file_bytes > both["float"].file_bytes
    assert dataclasses.replace(both["auto"], cache_note="") == both["int8"]
    assert both["auto"].cache_note == f"with a float cache the loss would be +{both['float'].loss_nats:.4f}"
    assert both["int8"].profile_sha256 == both["float"].profile_sha256
    assert both["int8"].loss_nats >= both["int8"].cache_nats > 0


def test_below_the_float_caches_minimum_codes_still_fit(maps: Callable[[str], Path], device: DeviceProfile) -> None:
    loaded = grown(maps("llama"))
    cache = 2 * 24 * 2 * 128 * 512  # keys and values of 24 layers, 2 heads of 128, 512 tokens
    least_float, least_int8 = (least(loaded, device, kind) for kind in ("float", "int8"))
    assert 0 < least_float - least_int8 <= 3 * cache
    assert least(loaded, device, "auto") == least_int8
    plan = Request(profile=device, budget_bytes=least_int8).plan(loaded)
    assert (plan.cache, plan.cache_note) == ("int8", "with a float cache nothing fits")


def test_where_there_is_no_choice_the_plan_says_why(maps: Callable[[str], Path], device: DeviceProfile) -> None:
    loaded = open_map(maps("llama"))
    assert loaded.identity.int8_cache is not None
    older = dataclasses.replace(loaded, identity=dataclasses.replace(loaded.identity, int8_cache=None))
    plan = Request(profile=device).plan(older)
    assert (plan.cache, plan.cache_note) == (
        "float",
        "this map was scored without an 8-bit cache: score the model again",
    )
    with pytest.raises(
        UsageError,
        match=(
            r"^no 8-bit cache for pico-llama: this map was scored without an 8-bit cache: score the "
            r"model again; or use"
        ),
    ):
        Request(profile=device, cache="int8").plan(older)
    assert offered(loaded.identity, "webgpu", "auto") == (
        ("float",),
        "the runtime reads 8-bit caches on the CPU only, not on webgpu",
    )
    refused = dataclasses.replace(loaded.identity.int8_cache, refusal="because")
    assert offered(dataclasses.replace(loaded.identity, int8_cache=refused), "cpu", "auto") == (("float",), "because")
    assert offered(loaded.identity, "cpu", "float") == (("float",), "")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_build_with_codes_is_validated_and_says_so(
    name: str, maps: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pico-box.toml").write_text(
        PROFILE.replace("chunk_tokens = 32", 'chunk_tokens = 32\nkv_cache = "int8"')
    )
    target = ["--profile", str(tmp_path / "pico-box.toml")]
    assert main(["build", str(maps(name)), *target, "-o", str(tmp_path / "out.bundle"), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["plan"]["cache"] == "int8"
    assert done["report"]["passed"] is True
    assert [check["value"] for check in done["report"]["checks"] if check["name"] == "key/value cache"] == ["int8"]
    assert (
        json.loads((tmp_path / "out.bundle" / "config.json").read_text())["transformers.js_config"]["kv_cache_dtype"]
        == "int8"
    )
    assert main(["plan", str(maps(name)), *target, "--kv-cache", "float"]) == 0
    assert "cache        float\n" in capsys.readouterr().out


def test_a_cache_that_is_none_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"^here: runtime\.kv_cache 'int4': expected one of auto, float, int8$"):
        parse_profile(PROFILE.replace("[context]", 'kv_cache = "int4"\n[context]'), where="here", name="box")


def test_plans_of_before_the_choice_are_still_read(maps: Callable[[str], Path], device: DeviceProfile) -> None:
    plain = Request(profile=device, cache="float").plan(open_map(maps("llama"))).to_dict()
    for key in ("cache", "cache_nats", "cache_note"):
        del plain[key]
    assert Plan.from_dict(plain, "plan.json").cache == "float"


def test_the_first_of_equal_plans_is_chosen(maps: Callable[[str], Path], device: DeviceProfile) -> None:
    plan = Request(profile=device, cache="float").plan(open_map(maps("llama")))
    other = dataclasses.replace(plan, cache="int8")
    assert chosen([plan, other], ("float", "int8")).cache == "float"


def test_a_graph_without_group_query_attention_is_refused(maps: Callable[[str], Path]) -> None:
    graph = ir.load(MapFolder(root=maps("llama")).skeleton("cpu").graph).graph
    assert (
        cache_facts(graph, "cuda").refusal == "the runtime reads 8-bit caches on the CPU only, this graph is for cuda"
    )
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "MultiHeadAttention"
    assert (
        cache_facts(graph, "cpu").refusal
        == "its caches are read by MultiHeadAttention, only GroupQueryAttention reads 8-bit ones"
    )


def test_scales_of_another_model_are_an_error(maps: Callable[[str], Path]) -> None:
    graph = ir.load(MapFolder(root=maps("llama")).skeleton("cpu").graph).graph
    scales = MapFolder(root=maps("llama")).reference.kv_scales()
    with pytest.raises(
        ExportError,
        match=r"^the graph has caches in layers \[0, 1\], the map has scales for \[0\]: they do not belong together$",
    ):
        quantise_caches(graph, {0: scales[0]})


@given(st.integers(1, 4), st.booleans(), st.floats(0, 2 * math.pi), st.integers(0, 2**16))
def test_no_position_turns_a_key_beyond_its_pairs_norm(pairs: int, interleaved: bool, angle: float, seed: int) -> None:
    keys = torch.randn(3, 2 * pairs + 2, generator=torch.Generator().manual_seed(seed))
    bound = pair_norms(keys, 2 * pairs, interleaved=interleaved)
    assert torch.equal(bound[:, -2:], keys[:, -2:].abs())
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    turned = keys.clone()
    turned[:, first] = keys[:, first] * math.cos(angle) - keys[:, second] * math.sin(angle)
    turned[:, second] = keys[:, first] * math.sin(angle) + keys[:, second] * math.cos(angle)
    assert bool((turned.abs() <= bound + 1e-5).all())
    assert torch.allclose(pair_norms(turned, 2 * pairs, interleaved=interleaved), bound, atol=1e-5)
