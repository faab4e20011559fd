"""Small tokenizers of the kinds that models are published with, trained here on a few lines, and chat templates.

Patterns and pipelines are those of the published files; vocabularies are of some hundred tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"
LINES = (
    "The quick brown fox jumps over the lazy dog. It's we're I'll they've DON'T, said McDonald of the iPhone.",
    "Numbers: 0 7 42 1969 3.14159 1,000,000 2026-11-21 0xFF 12345678",
    "naïve café Ångström Žižek résumé 日本語と中文 和 한국어 🚀 ✅",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }   spaces    and\t\ttabs\n\nand lines",
)
VOCABULARY = 700
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_ENDINGS, "").replace(r"\p{N}{1,3}", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", r"[一-龥ࠀ-一가-퟿]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of tokenizer: who is published with it, how to make one, and the part of the refusal it must meet."""

    like: str
    make: Callable[[], PreTrainedTokenizerFast]
    refused: str | None = None


def _opening(token: str, number: int, tail: str = "") -> Any:
    return processors.TemplateProcessing(single=f"{token} $A{tail}", special_tokens=[(token, number)])


def _fast(tokenizer: Tokenizer, begin: str | None, end: str, **settings: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, model_max_length=1024, **settings
    )


def byte_level(
    cut: Any = None,
    *,
    normal: Any = None,
    post: Any = None,
    whole_words: bool = False,
    prefix: bool = False,
    added: tuple[AddedToken, ...] = (),
    begin: str | None = BEGIN,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts with `cut`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.normalizer = normal
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.post_processor = post or processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(list(added))
    return _fast(tokenizer, begin, END)


def _cuts(*patterns: str, digits: bool = False) -> Any:
    parts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    if digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(
    normal: Any = None, cut: Any = None, *, strip: bool = True, decoder: Any = None, added: tuple[AddedToken, ...] = ()
) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE as converted files hold it: merges within words, a piece for every byte."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Trained on words, as SentencePiece is; converted files have no such step.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*\p{L}+|▁*\p{N}|▁+|[^▁\p{L}\p{N}]+"), "isolated")
    pieces = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20,
        special_tokens=["<unk>", "<s>", "</s>", *pieces],
        limit_alphabet=120,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normal, cut
    tokenizer.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if strip else []),
        ]
    )
    tokenizer.post_processor = _opening("<s>", 1)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in pieces]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(list(added))
    return _fast(tokenizer, "<s>", "</s>")


def _metaspace(scheme: str, *, split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=split)


def _unigram(*, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return _fast(tokenizer, "<s>", "</s>")


def _wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return _fast(tokenizer, "[CLS]", "[SEP]")


def _word_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return _fast(tokenizer, "[CLS]", "[SEP]")


_LEVEL = pre_tokenizers.ByteLevel
_PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_REPLACE = normalizers.Replace(" ", "▁")
_BOTH = processors.TemplateProcessing(
    single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B {END}", special_tokens=[(BEGIN, 0), (END, 1)]
)
_PAIR_ENDS = processors.TemplateProcessing(
    single=f"{BEGIN} $A", pair=f"{BEGIN} $A {END} $B", special_tokens=[(BEGIN, 0), (END, 1)]
)
_END_ONLY = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
_ROUND = tuple(
    AddedToken(f"<{name}>", special=special, normalized=not special, **flags)
    for name, special, flags in (
        ("left", True, {"lstrip": True}),
        ("right", True, {"rstrip": True}),
        ("both", True, {"lstrip": True, "rstrip": True}),
        ("plain", True, {}),
        ("text", False, {}),
        ("text2", False, {"rstrip": True}),
    )
)
_PHI3 = tuple(AddedToken(f"<|{name}|>", rstrip=True) for name in ("user", "assistant", "end"))

KINDS: dict[str, Kind] = {
    "gpt2": Kind(like="GPT-2", make=byte_level),
    "gpt2-bos": Kind(like="OPT, Falcon 3", make=lambda: byte_level(post=_opening(BEGIN, 0))),
    "gpt2-eos": Kind(like="models that end a text", make=lambda: byte_level(post=_END_ONLY)),
    "gpt2-bos-eos": Kind(like="RoBERTa-like", make=lambda: byte_level(post=_BOTH)),
    "gpt2-pair": Kind(like="an end in pairs alone", make=lambda: byte_level(post=_PAIR_ENDS)),
    "gpt2-opens-with-end": Kind(like="an end of text in front", make=lambda: byte_level(post=_opening(END, 1))),
    "gpt2-no-bos": Kind(like="no begin token", make=lambda: byte_level(begin=None)),
    "nfc": Kind(like="GPT-NeoX, OLMo", make=lambda: byte_level(normal=normalizers.NFC())),
    "nfkc": Kind(like="an NFKC byte-level", make=lambda: byte_level(normal=normalizers.NFKC())),
    "lowercase": Kind(
        like="an uncased byte-level", make=lambda: byte_level(normal=normalizers.Lowercase()), refused="Lowercase"
    ),
    "digits": Kind(
        like="SmolLM, StarCoder",
        make=lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _LEVEL(add_prefix_space=False)])),
    ),
    "llama3": Kind(
        like="Llama 3",
        make=lambda: byte_level(
            _cuts(_LLAMA3), whole_words=True, post=processors.Sequence([processors.ByteLevel(), _opening(BEGIN, 0)])
        ),
    ),
    "qwen2": Kind(like="Qwen 2, 2.5, 3", make=lambda: byte_level(_cuts(_QWEN2), normal=normalizers.NFC(), begin=None)),
    "gpt4o": Kind(like="GPT-OSS, Phi-4-mini", make=lambda: byte_level(_cuts(_GPT4O))),
    "tekken": Kind(like="Mistral Nemo", make=lambda: byte_level(_cuts(_TEKKEN), post=_opening(BEGIN, 0))),
    "deepseek-v3": Kind(like="DeepSeek V3, R1", make=lambda: byte_level(_cuts(*_DEEPSEEK_V3), post=_opening(BEGIN, 0))),
    "deepseek-coder": Kind(
        like="DeepSeek LLM, Coder", make=lambda: byte_level(_cuts(*_DEEPSEEK_CODER, digits=True)), refused="Split"
    ),
    "gpt2-split": Kind(like="GPT-2's pattern as a Split", make=lambda: byte_level(_cuts(_GPT2))),
    "no-pattern": Kind(
        like="bytes merged across words",
        make=lambda: byte_level(_LEVEL(add_prefix_space=False, use_regex=False)),
    ),
    "added": Kind(like="added tokens with every flag", make=lambda: byte_level(added=_ROUND)),
    "llama2": Kind(like="Llama 2, TinyLlama", make=lambda: sentencepiece(_PREPEND)),
    "llama2-added": Kind(like="Llama 2 with tokens added", make=lambda: sentencepiece(_PREPEND, added=_ROUND[:4])),
    "metaspace-first": Kind(like="Mistral, Phi-3", make=lambda: sentencepiece(cut=_metaspace("first"))),
    "phi3": Kind(like="Phi-3", make=lambda: sentencepiece(cut=_metaspace("first"), added=_PHI3)),
    "metaspace-always": Kind(like="LlamaTokenizer, legacy", make=lambda: sentencepiece(cut=_metaspace("always"))),
    "metaspace-split": Kind(
        like="Metaspace by words", make=lambda: sentencepiece(cut=_metaspace("always", split=True)), refused="Metaspace"
    ),
    "metaspace-never": Kind(
        like="LlamaTokenizer, no prefix", make=lambda: sentencepiece(cut=_metaspace("never"), strip=False)
    ),
    "metaspace-decoder": Kind(
        like="Metaspace's own decoder",
        make=lambda: sentencepiece(
            cut=_metaspace("first"),
            decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
        ),
    ),
    "gemma": Kind(like="Gemma 1, 2", make=lambda: sentencepiece(_REPLACE, strip=False)),
    "gemma3": Kind(
        like="Gemma 3",
        make=lambda: sentencepiece(_REPLACE, pre_tokenizers.Split(" ", "merged_with_previous"), strip=False),
    ),
    "unigram": Kind(like="T5, XLM-R, XGLM", make=_unigram, refused="Unigram"),
    "wordpiece": Kind(like="BERT", make=_wordpiece, refused="WordPiece"),
    "word-level": Kind(like="a list of words", make=_word_level, refused="word-level"),
}

_CHATML = (
    "{% for message in messages %}{{ '<|begin|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|begin|>assistant\\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
_REPLACING = _CHATML.replace("message['role'] +", "message['role'].replace('assistant', 'model') +")
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system line') }}{% endif %}" + _CHATML
_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|begin|>system\\nYou help.<|end|>\\n' }}{% endif %}" + _CHATML.removeprefix("{% for message in messages %}")
)
_GENERATION = _CHATML.replace("{{ '<|begin|>' +", "{% generation %}{{ '<|begin|>' +", 1).replace(
    "{% endfor %}", "{% endgeneration %}{% endfor %}", 1
)
_MACRO = (
    "{%- macro turn(role, text) -%}\n    <|begin|>{{ role.upper() }}: {{ text | trim }}<|end|>\n{% endmacro -%}\n"
    "{%- for message in messages %}\n    {{- turn(message.role, message.content) }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|begin|>ASSISTANT:' }}\n{%- endif %}\n"
)
_DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '\\n' }}" + _CHATML
_SYSTEM_LAST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last %}{{ ns.system }}{% endif %} {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_COUNTING = "{% for message in messages %}{{ '%03d ' % loop.index }}" + _CHATML.removeprefix(
    "{% for message in messages %}"
)
_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_GROWING = "{% set ns = namespace(x='0123456789') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A chat template: who has one like it, and the part of the refusal it must meet."""

    like: str
    text: str
    refused: str | None = None


TEMPLATES: dict[str, Template] = {
    "chatml": Template(like="Qwen, SmolLM", text=_CHATML),
    "llama2": Template(like="Llama 2: the system line inside the first turn", text=_LLAMA2),
    "zephyr": Template(like="Zephyr, TinyLlama: white space cut around blocks", text=_ZEPHYR),
    "no-system": Template(like="Gemma: refuses a system line", text=_NO_SYSTEM),
    "default-system": Template(like="Qwen 2: a system line of its own", text=_DEFAULT_SYSTEM),
    "generation": Template(like="templates for training", text=_GENERATION),
    "replace": Template(like="a method that the runtime lacks", text=_REPLACING),
    "macro": Template(like="macros and methods", text=_MACRO),
    "dated": Template(like="Llama 3.1: the date", text=_DATED),
    "system-last": Template(like="Mistral: the system line in the last turn", text=_SYSTEM_LAST),
    "counting": Template(like="what depends on the turn's number", text=_COUNTING, refused="--no-chat-template"),
    "endless": Template(like="a loop without end", text=_ENDLESS, refused="was stopped"),
    "growing": Template(like="a text that grows for ever", text=_GROWING, refused="was stopped"),
    "broken": Template(like="no template at all", text="{% for %}", refused="fails in transformers itself"),
}
