"""Pico configurations of the families beside those of `conftest.PICO`: the mapping of each name to its class and what
makes its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,  # its root is no number of two decimals
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_HEAD = {"head_dim": 32}
_HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, tuple[type[Any], Callable[[], PretrainedConfig]]] = {
    "gemma2": (Gemma2ForCausalLM, lambda: Gemma2Config(**SHAPE, **_HEAD, sliding_window=48)),
    "glm": (GlmForCausalLM, lambda: GlmConfig(**SHAPE, **_HEAD, rope_parameters=_HALF)),
    "granite hybrid": (
        GraniteMoeHybridForCausalLM,
        lambda: GraniteMoeHybridConfig(
            **SHAPE,
            layer_types=["full_attention"] * 2,
            num_local_experts=0,
            position_embedding_type="rope",
            shared_intermediate_size=104,
            mamba_n_heads=4,
            mamba_d_head=64,
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            attention_multiplier=0.25,
            logits_scaling=2.0,
        ),
    ),
    "hunyuan": (HunYuanDenseV1ForCausalLM, lambda: HunYuanDenseV1Config(**SHAPE, **_HEAD)),
    "lfm2": (
        Lfm2ForCausalLM,
        lambda: Lfm2Config(
            **(SHAPE | {"num_hidden_layers": 3, "hidden_size": 64}),
            layer_types=["conv", "full_attention", "conv"],
            block_multiple_of=8,
        ),
    ),
    "nemotron": (
        NemotronForCausalLM,
        lambda: NemotronConfig(**SHAPE, **_HEAD, tie_word_embeddings=False, norm_eps=1e-3, rope_parameters=_HALF),
    ),
    "olmo": (OlmoForCausalLM, lambda: OlmoConfig(**SHAPE, tie_word_embeddings=False)),
    "phi": (PhiForCausalLM, lambda: PhiConfig(**SHAPE, rope_parameters=_HALF)),
    "qwen3.5": (
        Qwen3_5ForCausalLM,
        lambda: Qwen3_5TextConfig(
            **SHAPE,
            head_dim=64,
            tie_word_embeddings=True,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            rope_parameters=_HALF | {"partial_rotary_factor": 0.25},
        ),
    ),
}
