"""What a model is, told from its configuration alone: a language model that can be packed, or what else.

Which class does which task is transformers' own table; which classes become graphs is the exporter's own dispatch.
Nothing of the model is loaded, and code that it brings is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from packager.errors import UnsupportedModelError
from packager.graph.skeleton import exporter_architectures


class Kind(Enum):
    """What a model is. Only a LANGUAGE_MODEL can be packed; of the others, the value is what a message says."""

    LANGUAGE_MODEL = "a language model that generates text"
    NO_BUILDER = "a language model that the exporter has no graph for"
    ENCODER = "an encoder, not a language model that generates text"
    ENCODER_DECODER = "an encoder-decoder, which reads its whole input before it writes"
    MULTIMODAL = "a model of pictures or sound beside text"
    AUDIO = "a model of speech or sound"
    CLASSIFIER = "a model with a head that classifies, answers or rewards"
    BARE = "a model without the head that predicts tokens"
    OTHER = "no language model"
    REMOTE_CODE = "a model that brings its own code"
    UNKNOWN = "a model that transformers does not know"
    CONTRADICTORY = "a model whose architecture is not that of its model type"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a configuration describes. `architecture` is the class it names or, where it names none, that of its
    `model_type`; "" where neither is known. `expected` is transformers' language model of that type, or ""."""

    kind: Kind
    architecture: str
    model_type: str
    expected: str


_GENERATES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_BARE = "MODEL_MAPPING_NAMES"
# Searched in this order: BART's class, for one, is in four tables.
_TASKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.AUDIO, ("SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT", "AUDIO_", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM")),
    (Kind.ENCODER_DECODER, ("SEQ_TO_SEQ_CAUSAL_LM",)),
    (Kind.MULTIMODAL, ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISUAL_QUESTION", "DOCUMENT_QUESTION")),
    (
        Kind.CLASSIFIER,
        (
            "SEQUENCE_CLASSIFICATION",
            "TOKEN_CLASSIFICATION",
            "QUESTION_ANSWERING",
            "MULTIPLE_CHOICE",
            "NEXT_SENTENCE",
            "DECISION",
            "RETRIEVAL",
        ),
    ),
    (Kind.ENCODER, ("MASKED_LM", "TEXT_ENCODING")),
)
_SENSES = ("vision_config", "audio_config", "speech_config", "vision_tower", "mm_vision_tower", "audio_processor")
_ADVICE = {
    Kind.ENCODER: "give a decoder, such as a Llama, Qwen, Gemma or Phi model",
    Kind.ENCODER_DECODER: "give a decoder-only model, such as a Llama, Qwen, Gemma or Phi model",
    Kind.MULTIMODAL: "its text part cannot be taken out here: give the text-only model of the same family",
    Kind.AUDIO: "give a decoder of text, such as a Llama, Qwen, Gemma or Phi model",
    Kind.CLASSIFIER: "give the language model that it was made from",
    Kind.BARE: "give the checkpoint that has the head, or name the language model's class in config.json's "
    "architectures if the embedding is the head",
    Kind.OTHER: "give a decoder of text, such as a Llama, Qwen, Gemma or Phi model",
    Kind.REMOTE_CODE: "code from a model is never run here: give a model of an architecture that transformers has "
    "itself",
}


def identify(config: Mapping[str, Any]) -> Identity:
    """What the content of a config.json describes."""
    model_type = _text(config.get("model_type"))
    names = config.get("architectures")
    named = _text(names[0]) if isinstance(names, list) and names else ""
    expected = _class_for(model_type, _GENERATES)
    architecture = named or expected or _class_for(model_type, _BARE)
    kind = _kind(config, model_type, named, architecture, expected)
    return Identity(kind=kind, architecture=architecture, model_type=model_type, expected=expected)


def _kind(config: Mapping[str, Any], model_type: str, named: str, architecture: str, expected: str) -> Kind:
    if _brings_code(config, model_type, expected):
        return Kind.REMOTE_CODE
    if any(config.get(key) for key in _SENSES):
        return Kind.MULTIMODAL
    if model_type not in modeling_auto.CONFIG_MAPPING_NAMES:
        return Kind.UNKNOWN
    tasks = _tasks(named) if named else _type_tasks(model_type)
    if config.get("is_encoder_decoder") is True and not any("SPEECH" in task for task in tasks):
        return Kind.ENCODER_DECODER
    for kind, marks in _TASKS:
        if any(mark in task for mark in marks for task in tasks):
            return kind
    # Encoders, and halves of encoder-decoders, have classes that predict tokens as a decoder inside another model.
    if model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return Kind.ENCODER_DECODER
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return Kind.ENCODER
    if _GENERATES not in tasks:
        if _BARE in tasks and expected:
            return Kind.BARE
        return Kind.OTHER if tasks or not expected else Kind.CONTRADICTORY
    if architecture != expected:
        return Kind.CONTRADICTORY
    return Kind.LANGUAGE_MODEL if architecture in exporter_architectures() else Kind.NO_BUILDER


def refuse_unless_language_model(source: str, identity: Identity) -> None:
    """UnsupportedModelError for all that cannot be packed, saying what `source` is and what to do."""
    kind = identity.kind
    name = identity.architecture or f"model type {identity.model_type!r}"
    match kind:
        case Kind.LANGUAGE_MODEL:
            return
        case Kind.NO_BUILDER:
            raise UnsupportedModelError(
                f"{source}: {name} is {kind.value}: expected one of {', '.join(packable_architectures())}"
            )
        case Kind.UNKNOWN if not identity.model_type:
            raise UnsupportedModelError(
                f"{source}: config.json names no model_type, so it is not a model that transformers reads: give a "
                "Hugging Face folder of a language model"
            )
        case Kind.UNKNOWN:
            raise UnsupportedModelError(
                f"{source}: model type {identity.model_type!r} is not known to transformers "
                f"{transformers.__version__}: upgrade transformers if it is newer, or give another model"
            )
        case Kind.CONTRADICTORY:
            raise UnsupportedModelError(
                f"{source}: config.json names the architecture {name}, but the language model of its model type "
                f"{identity.model_type!r} is {identity.expected or 'none'}: correct config.json if the weights are "
                "that model's, or give another model"
            )
        case _:
            raise UnsupportedModelError(f"{source}: {name} is {kind.value}: {_ADVICE[kind]}")


def packable_architectures() -> list[str]:
    """Names of the classes that can be packed."""
    types = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(
        {
            name
            for model_type, name in types.items()
            if identify({"model_type": model_type, "architectures": [name]}).kind is Kind.LANGUAGE_MODEL
        }
    )


def _brings_code(config: Mapping[str, Any], model_type: str, expected: str) -> bool:
    """Whether the model needs code of its own. Many published models name code that transformers has taken in since:
    where the classes have the same names, transformers' are used."""
    code = config.get("auto_map")
    if not isinstance(code, Mapping):
        return False
    if model_type not in modeling_auto.CONFIG_MAPPING_NAMES:
        return bool(code)
    own = {"AutoConfig": modeling_auto.CONFIG_MAPPING_NAMES[model_type], "AutoModelForCausalLM": expected}
    return any(
        _text(value).rpartition(".")[2] != own[key]
        for key, value in code.items()
        if key in own and isinstance(key, str)
    )


def _tables() -> dict[str, Mapping[str, Any]]:
    return {
        name: table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES") and "PRETRAINING" not in name
    }


def _tasks(architecture: str) -> set[str]:
    """Tables of transformers in which `architecture` does a task."""
    return {
        name
        for name, table in _tables().items()
        if any(architecture in ((value,) if isinstance(value, str) else value) for value in table.values())
    }


def _type_tasks(model_type: str) -> set[str]:
    """Tasks of a type whose configuration names no class: heads that are put on later are not among them."""
    tasks = {name for name, table in _tables().items() if model_type in table}
    heads = next(marks for kind, marks in _TASKS if kind is Kind.CLASSIFIER)
    return {task for task in tasks if not any(mark in task for mark in heads)}


def _class_for(model_type: str, table: str) -> str:
    return _text(getattr(modeling_auto, table).get(model_type))


def _text(value: object) -> str:
    """A name in a configuration; no class has one that is longer than what is left here."""
    return value[:200] if isinstance(value, str) else ""
