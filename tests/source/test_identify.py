"""What a configuration describes, for every kind of model that people publish."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto import modeling_auto

from packager.errors import UnsupportedModelError
from packager.graph.skeleton import exporter_architectures
from packager.source.identify import Kind, identify, packable_architectures, refuse_unless_language_model


@pytest.mark.parametrize(
    ("model_type", "architecture", "kind"),
    [
        ("llama", "LlamaForCausalLM", Kind.LANGUAGE_MODEL),
        ("gemma3_text", "Gemma3ForCausalLM", Kind.LANGUAGE_MODEL),
        ("llama", "", Kind.LANGUAGE_MODEL),
        ("gpt2", "GPT2LMHeadModel", Kind.NO_BUILDER),
        ("mamba", "MambaForCausalLM", Kind.NO_BUILDER),
        ("rwkv", "RwkvForCausalLM", Kind.NO_BUILDER),
        ("bert", "BertModel", Kind.ENCODER),
        ("bert", "BertLMHeadModel", Kind.ENCODER),
        ("bert", "", Kind.ENCODER),
        ("roberta", "RobertaForMaskedLM", Kind.ENCODER),
        ("modernbert", "ModernBertForMaskedLM", Kind.ENCODER),
        ("xlm-roberta", "XLMRobertaModel", Kind.ENCODER),
        ("t5", "T5EncoderModel", Kind.ENCODER),
        ("t5", "T5ForConditionalGeneration", Kind.ENCODER_DECODER),
        ("t5", "", Kind.ENCODER_DECODER),
        ("bart", "BartForConditionalGeneration", Kind.ENCODER_DECODER),
        ("bart", "BartForCausalLM", Kind.ENCODER_DECODER),
        ("marian", "MarianMTModel", Kind.ENCODER_DECODER),
        ("whisper", "WhisperForConditionalGeneration", Kind.AUDIO),
        ("whisper", "", Kind.AUDIO),
        ("wav2vec2", "Wav2Vec2ForCTC", Kind.AUDIO),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", Kind.MULTIMODAL),
        ("gemma3", "Gemma3ForConditionalGeneration", Kind.MULTIMODAL),
        ("llava", "LlavaForConditionalGeneration", Kind.MULTIMODAL),
        ("mistral3", "Mistral3ForConditionalGeneration", Kind.MULTIMODAL),
        ("gemma4", "", Kind.MULTIMODAL),
        ("llama", "LlamaForSequenceClassification", Kind.CLASSIFIER),
        ("qwen2", "Qwen2ForTokenClassification", Kind.CLASSIFIER),
        ("bert", "BertForSequenceClassification", Kind.CLASSIFIER),
        ("llama", "LlamaModel", Kind.BARE),
        ("vit", "ViTForImageClassification", Kind.OTHER),
        ("clip", "CLIPModel", Kind.OTHER),
        ("qwen2", "Qwen2ForRewardModel", Kind.CONTRADICTORY),
        ("llama", "MistralForCausalLM", Kind.CONTRADICTORY),
        ("florps", "FlorpsForCausalLM", Kind.UNKNOWN),
        ("", "", Kind.UNKNOWN),
    ],
)
def test_what_a_model_is(model_type: str, architecture: str, kind: Kind) -> None:
    config: dict[str, Any] = {"model_type": model_type} | ({"architectures": [architecture]} if architecture else {})
    identity = identify(config)
    assert identity.kind is kind
    if kind is Kind.LANGUAGE_MODEL:
        refuse_unless_language_model("model", identity)
        return
    with pytest.raises(UnsupportedModelError) as caught:
        refuse_unless_language_model("model", identity)
    text = str(caught.value)
    assert text.startswith("model: ")
    assert "\n" not in text
    assert not any(mark in text for mark in ("<", "None", "Kind"))


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config": {"hidden_size": 3}},
        {"audio_config": {"hidden_size": 3}},
        {"mm_vision_tower": "openai/clip-vit-large-patch14"},
    ],
)
def test_a_language_model_with_senses_is_not_one(changes: dict[str, Any]) -> None:
    identity = identify({"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | changes)
    assert identity.kind is Kind.MULTIMODAL


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": {"AutoModel": "m.ChatGLMModel"}},
        {"model_type": "internlm2", "auto_map": {"AutoModelForCausalLM": "m.InternLM2ForCausalLM"}},
        {"model_type": "llama", "auto_map": {"AutoConfig": "m.OtherConfig"}},
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "owner/repo--m.OtherForCausalLM"}},
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": ["m.LlamaForCausalLM"]}},
    ],
)
def test_models_with_code_of_their_own(config: dict[str, Any]) -> None:
    assert identify(config).kind is Kind.REMOTE_CODE


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 3, "architectures": 3},
        {"model_type": ["llama"], "architectures": [["LlamaForCausalLM"]]},
        {"model_type": "llama", "architectures": [], "auto_map": "x"},
        {"model_type": None, "architectures": {}},
    ],
)
def test_any_json_is_identified(config: dict[str, Any]) -> None:
    identify(config)


def test_every_language_model_of_transformers_is_told() -> None:
    """By its class and by its type alone it is the same, or more than a language model."""
    for model_type, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        named = identify({"model_type": model_type, "architectures": [name]}).kind
        bare = identify({"model_type": model_type}).kind
        assert named not in (Kind.UNKNOWN, Kind.CONTRADICTORY, Kind.OTHER, Kind.BARE, Kind.CLASSIFIER), model_type
        assert named is bare or bare in (Kind.MULTIMODAL, Kind.AUDIO), model_type


def test_the_exporters_dispatch_is_read() -> None:
    assert {"LlamaForCausalLM", "Phi3ForCausalLM", "WhisperForConditionalGeneration"} <= exporter_architectures()
    assert {"Qwen3ForCausalLM", "SmolLM3ForCausalLM"} <= set(packable_architectures())
    assert not any("ConditionalGeneration" in name for name in packable_architectures())
