"""The graph check: what the exporter draws rightly passes, what it draws wrongly or no kernel runs is refused, in a
second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import PICO
from pico_families import FAMILIES
from transformers import CONFIG_MAPPING, OlmoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packager.errors import UnsupportedModelError
from packager.graph.skeleton import DRAWN_AS, export_skeleton
from packager.scoring.graph_check import LIMIT_ERROR, check_graph, random_model, reduced, thresholds
from packager.source.checkpoint import vectors

THETA = 10000.0
KEPT = ("model_type", "rope_parameters", "architectures", "tie_word_embeddings")
TYPES = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}


def config_of(name: str, **changes: Any) -> PretrainedConfig:
    kind, configure = (PICO | FAMILIES)[name]
    base = configure()
    config: PretrainedConfig = base.__class__.from_dict(base.to_dict() | changes)
    config.architectures = [kind.__name__]
    return config


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": THETA, **more}


LONGROPE = {
    "original_max_position_embeddings": 512,
    "factor": 2.0,
    "short_factor": [1.0 + 0.1 * at for at in range(8)],
    "long_factor": [2.0 + 0.5 * at for at in range(8)],
}
GEMMA_4B = {"sliding_attention": rope("default"), "full_attention": rope("linear", factor=8.0)}
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PICO | FAMILIES},
    "linear": ("llama", {"rope_parameters": rope("linear", factor=4.0)}),
    "dynamic": ("llama", {"rope_parameters": rope("dynamic", factor=4.0)}),
    "yarn": ("qwen2", {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=256)}),
    "llama3": (
        "llama",
        {
            "rope_parameters": rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
            )
        },
    ),
    "gemma 4b": ("gemma3", {"rope_parameters": GEMMA_4B}),
}


@pytest.mark.parametrize("case", sorted(RIGHT))
def test_a_right_graph_passes_whole_and_in_pieces(case: str) -> None:
    name, changes = RIGHT[case]
    found = check_graph(config_of(name, **changes))
    assert max(found.errors.values()) < LIMIT_ERROR / 10
    assert found.whole_prompt == 0


def test_a_prompt_past_the_length_of_longrope_is_right_only_in_one_piece() -> None:
    config = config_of("phi3", original_max_position_embeddings=512, rope_parameters=rope("longrope", **LONGROPE))
    found = check_graph(config)
    assert set(found.errors) == {0, 512}
    assert found.whole_prompt == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head_dim": 20},
            r"heads of 20\): head_size must be a multiple of 8\. Got head_size % 8 == 4; this model",
        ),
        (
            {"head_dim": 8},
            r"heads of 8\): head_size shall be a multiple of 16\. Got head_size % 16 == 8; this",
        ),
    ],
)
def test_what_no_kernel_runs_is_refused_by_the_runtime_s_own_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_graph(config_of("llama", **changes))


def test_a_wrong_graph_is_refused() -> None:
    shape = {key: value for key, value in PICO["llama"][1]().to_dict().items() if key not in ("model_type", "head_dim")}
    config = OlmoConfig.from_dict(shape | {"clip_qkv": 1.0})
    config.architectures = ["OlmoForCausalLM"]
    with pytest.raises(
        UnsupportedModelError,
        match=r"^the exporter's graph of OlmoForCausalLM is wrong in any prompt \(it has heads of 16\): its",
    ):
        check_graph(config)


@pytest.mark.parametrize("name", sorted(DRAWN_AS))
def test_an_architecture_that_is_drawn_as_another_computes_what_torch_does(name: str) -> None:
    default = CONFIG_MAPPING[TYPES[name]]().to_dict()
    shape = {key: value for key, value in PICO["llama"][1]().to_dict().items() if key not in KEPT}
    # Kernels of rotary embedding take no less than 16 channels, which may be a quarter of a head.
    shape |= {"num_attention_heads": 2, "head_dim": 64, "hidden_size": 128}
    config = CONFIG_MAPPING[TYPES[name]].from_dict(default | {"layer_types": None} | shape)
    config.architectures = [name]
    assert max(check_graph(config).errors.values()) < LIMIT_ERROR / 10


def test_thresholds_are_every_length_that_the_configuration_names() -> None:
    config = config_of("phi3", original_max_position_embeddings=256, sliding_window=48)
    config.rope_parameters = rope("longrope", original_max_position_embeddings=512)
    assert thresholds(config) == {48: 48, 256: 256, 512: 256}
    assert thresholds(config_of("llama")) == {}


def test_the_reduced_model_keeps_one_layer_of_each_kind() -> None:
    config = config_of("gemma3", num_hidden_layers=8, layer_types=["sliding_attention"] * 5 + ["full_attention"] * 3)
    small = reduced(config)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    last = reduced(config_of("lfm2"))
    assert last.layer_types == ["conv", "full_attention", "conv"], "the last layer's kind is last"
    assert (small.num_hidden_layers, small.hidden_size, small.head_dim) == (2, 64, 16)


def test_a_layer_that_the_exporter_takes_for_the_head_is_refused() -> None:
    config = config_of("lfm2")
    config.architectures = ["Lfm2ForCausalLM"]
    config.vocab_size = 3 * config.hidden_size
    model = random_model(config)
    with pytest.raises(
        UnsupportedModelError, match=r"^layer model\.layers\.0\.conv\.in_proj of Lfm2ForCausalLM has 192"
    ):
        export_skeleton(config, dict(vectors(model)), "cpu", Path("never"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "granite hybrid",
            {"layer_types": ["linear_attention"] * 2},
            r"cannot draw Granite\w+, whose layers are of the",
        ),
        (
            "llama",
            {"hidden_size": "wide"},
            r"^no small model like LlamaForCausalLM can be made to check its graph with",
        ),
    ],
)
def test_what_cannot_be_made_or_drawn_is_refused_in_words(name: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(name)
    for key, value in changes.items():
        object.__setattr__(config, key, value)
    with pytest.raises(UnsupportedModelError, match=message):
        check_graph(config)
