"""Pico models of several architectures, made offline from their configs with seeded random weights, and texts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from pico_families import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from packager.progress import Silent
from packager.scoremap.settings import ScoreSettings
from packager.scoring.score import score_model
from packager.source.checkpoint import open_checkpoint

# Tensors this small are slower on several threads than on one, far slower where cores are shared.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A machine that others compute on is slow at random.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
# Nothing here may ask the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_WORDS = """
the a of and to in is that it was for on are as with his they at be this have from or one had by word but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so
some her would make like him into time has look two more write go see number no way could people my than first water
been call who oil its now find long down day did get come made may part
""".split()  # noqa: SIM905  a list of a hundred literals would be no easier to read
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 104,  # no multiple of any block: the last one is padded
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _smollm3() -> PretrainedConfig:
    # The second layer has no rotary embedding, as every fourth has in the real model.
    return SmolLM3Config(**_SHAPE, tie_word_embeddings=True, no_rope_layers=[1, 0], rope_parameters=_ROPE)


def _gemma3() -> PretrainedConfig:
    return Gemma3TextConfig(
        **(_SHAPE | {"num_hidden_layers": 3}),
        tie_word_embeddings=True,
        sliding_window=32,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    )


PICO: dict[str, tuple[type[Any], Callable[[], PretrainedConfig]]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True, rope_parameters=_ROPE)),
    "mistral": (
        MistralForCausalLM,
        lambda: MistralConfig(**_SHAPE, tie_word_embeddings=False, sliding_window=48, rope_parameters=_ROPE),
    ),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=False, rope_parameters=_ROPE)),
    "qwen3": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**(_SHAPE | {"head_dim": 32}), tie_word_embeddings=True, rope_parameters=_ROPE),
    ),
    "gemma3": (Gemma3ForCausalLM, _gemma3),
    "phi3": (
        Phi3ForCausalLM,
        lambda: Phi3Config(
            **_SHAPE, tie_word_embeddings=False, rope_parameters=_ROPE, original_max_position_embeddings=1024
        ),
    ),
    "smollm3": (SmolLM3ForCausalLM, _smollm3),
}


def random_model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A pico model in float32 whose activations and logits are of ordinary size; `changes` go into its config."""
    kind, configure = (PICO | FAMILIES)[name]
    config = configure()
    for key, value in changes.items():
        setattr(config, key, value)
    config.architectures = [kind.__name__]
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                # Unit rows make activations of order one; the tables' larger ones make logits that prefer some tokens.
                scale = (2.0 if "embed" in key or "lm_head" in key else 1.0) / parameter.shape[1] ** 0.5
                parameter.copy_(values * scale)
            elif key.endswith("bias"):
                parameter.copy_(values * 0.1)
            else:
                # These norms multiply by 1 + weight.
                centre = 0.0 if name in ("gemma3", "gemma2", "nemotron", "qwen3.5") else 1.0
                parameter.copy_(centre + values * 0.1)
    return model


def random_text(seed: int, words: int) -> str:
    """Sentences of common words, drawn by a seeded generator so that some follow others more often."""
    generator = np.random.default_rng(seed)
    follow = generator.integers(0, len(_WORDS), (len(_WORDS), 8))
    word, sentences, sentence = 0, [], []
    for _ in range(words):
        sentence.append(_WORDS[word])
        word = int(follow[word, generator.integers(8)])
        if len(sentence) > 6 and generator.random() < 0.15:
            sentences.append(" ".join(sentence).capitalize() + ".")
            sentence = []
    return " ".join([*sentences, " ".join(sentence)])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few lines: every text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(1, 2000)], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pico:
    """A model on disk as a Hugging Face folder, and the same in memory."""

    name: str
    folder: Path
    model: torch.nn.Module


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def picos(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Pico]:
    """Pico models by name, each made once in a session. Tests must not write into them."""
    made: dict[str, Pico] = {}

    def get(name: str) -> Pico:
        if name not in made:
            model = random_model(name)
            folder = tmp_path_factory.mktemp("picos") / f"pico-{name.replace(' ', '-')}"
            model.save_pretrained(folder)  # type: ignore[operator]
            tokenizer.save_pretrained(folder)
            made[name] = Pico(name=name, folder=folder, model=model)
        return made[name]

    return get


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Pico:
    """A pico LLaMA that has learned texts like `calibration_text`. What a random one loses when it is rounded is as
    often a gain: only this one says whether losses rise as they should."""
    model = random_model("llama", seed=1)
    ids = torch.tensor(tokenizer(random_text(2, 30_000), verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        starts = torch.randint(len(ids) - 65, (8,), generator=generator)
        batch = torch.stack([ids[start : start + 65] for start in starts])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("picos") / "taught"
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return Pico(name="taught", folder=folder, model=model)


@pytest.fixture(params=sorted(PICO))
def pico(request: pytest.FixtureRequest, picos: Callable[[str], Pico]) -> Pico:
    """Every architecture in turn."""
    return picos(request.param)


@pytest.fixture
def pico_copy(picos: Callable[[str], Pico], tmp_path: Path) -> Path:
    """A copy of the LLaMA's folder to damage."""
    return Path(shutil.copytree(picos("llama").folder, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 16 windows of 512 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(random_text(2, 6500), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def maps(
    tmp_path_factory: pytest.TempPathFactory,
    picos: Callable[[str], Pico],
    calibration_text: Path,
    request: pytest.FixtureRequest,
) -> Callable[[str], Path]:
    """Quick score maps of the pico models by name, each made once in a session. Tests must not write into them."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("maps") / f"{name}.map"
            settings = ScoreSettings(tokens=2048, quick=True)
            pico: Pico = request.getfixturevalue("taught") if name == "taught" else picos(name)
            score_model(
                open_checkpoint(str(pico.folder)),
                out,
                settings,
                calibration_paths=[calibration_text],
                progress=Silent(),
            )
            made[name] = out
        return made[name]

    return get
