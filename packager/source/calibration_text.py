"""Calibration text: files to windows of tokens, some of them held out for measuring."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from packager.errors import CalibrationError
from packager.source.text_records import Conversation, Render
from packager.source.text_samples import LIMIT, read_beginning, read_sample

WINDOW = 512
HELDOUT_WINDOWS = 8
_LEAST_WINDOWS = 4
# In nats per byte, the one unit in which languages, vocabularies and models compare. A page each with the reference
# model: English, C and Python 0.5 to 0.75; seven languages it hardly saw 1.1 to 2.3; shuffled words 1.7; noise 2.4 to
# 5.
_UNFAMILIAR = 0.9
_MOST_TOKEN_CHARACTERS = 16  # of ordinary text a window of tokens never needs more on average


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationText:
    """`windows` (n, 512) and `heldout` (8, 512) of token ids, disjoint; where they come from, and their hash."""

    windows: Tensor
    heldout: Tensor
    description: str
    sha256: str


def built_in_text() -> str:
    """Text that is always at hand: the language reference that CPython carries for its help()."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[key] for key in sorted(topics))


def load_calibration(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int
) -> CalibrationText:
    """About `tokens` tokens in shares by length from each path, and held-out windows that calibration never sees.

    Of a text of more than 4,000,000 characters only pieces are read, from all over it (`text_samples`); a shorter one
    is cut into windows whole. Either way the choice is the seed's: more `tokens` add windows to the same ones. A path
    is a file of a kind that `text_files` reads, or a folder of them.

    Raises CalibrationError for files that are missing, empty, malformed or together too short.
    """
    wanted = max(1, -(-tokens // WINDOW))
    render = chat_renderer(tokenizer)
    if paths:
        texts = [read_sample(path, "calibration text", render, seed) for path in paths]
        description = ", ".join(path.name or path.resolve().name for path in paths)
    else:
        texts, description = [built_in_text()], "built-in text (CPython's language reference)"
    pools = [
        _whole_pool(text, tokenizer) if isinstance(text, str) else _sampled_pool(text, tokenizer, wanted)
        for text in texts
    ]
    found = sum(len(pool.windows) for pool in pools)
    if found < _LEAST_WINDOWS:
        raise CalibrationError(
            f"calibration text {description} is too short: {found} windows of {WINDOW} tokens, expected at least "
            f"{_LEAST_WINDOWS}; add text with --calibration"
        )
    heldout_count = min(HELDOUT_WINDOWS, found // 4)
    generator = torch.Generator().manual_seed(seed)
    mixed = _interleave([pool if pool.mixed else pool.shuffled(generator) for pool in pools])
    heldout, windows = mixed[:heldout_count], mixed[heldout_count : heldout_count + wanted]
    digest = hashlib.sha256(torch.cat([windows, heldout]).to(torch.int64).numpy().tobytes()).hexdigest()
    return CalibrationText(windows=windows, heldout=heldout, description=description, sha256=digest)


def nats_per_byte(token_nats: Tensor, windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """Loss per byte of text on (n, length) windows, from the loss of each token but the first, (n, length - 1)."""
    texts = tokenizer.batch_decode(
        windows[:, 1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return float(token_nats.double().sum()) / max(1, sum(len(text.encode()) for text in texts))


def unfamiliar(description: str, per_token: float, per_byte: float) -> str | None:
    """A warning where held-out text, by its mean loss in nats, is far harder for the model than text that it knows."""
    if per_byte <= _UNFAMILIAR:
        return None
    return (
        f"the model does not know text like {description}: its held-out part costs {per_token:.4f} nats per token, "
        f"{per_byte:.2f} per byte, "
        f"where known text costs less than {_UNFAMILIAR:.2f}; if it is in another language, or no text, score again "
        "with --calibration text of the "
        "model's own kind"
    )


def text_windows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """The first windows of a text, at most `count`: (n, 512) token ids. CalibrationError when there is not one."""
    text = read_beginning(path, "text", chat_renderer(tokenizer), count * WINDOW * _MOST_TOKEN_CHARACTERS)
    windows = _windows(text, tokenizer)[:count]
    if not len(windows):
        raise CalibrationError(f"text {path} is too short: expected at least one window of {WINDOW} tokens")
    return windows


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """What turns a conversation into the text that the model reads: the tokenizer's chat template."""

    def render(turns: Conversation) -> str:
        if not tokenizer.chat_template:
            raise CalibrationError(
                "a conversation, and the model has no chat template to write it with: give plain text, or a field "
                "'text'"
            )
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    return render


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pool:
    """The windows of one text, and `length`, how many the text has by which it shares. `mixed` once their order is
    chance."""

    windows: Tensor
    length: int
    mixed: bool

    def shuffled(self, generator: torch.Generator) -> _Pool:
        order = torch.randperm(len(self.windows), generator=generator)
        return _Pool(windows=self.windows[order], length=self.length, mixed=True)


def _whole_pool(text: str, tokenizer: PreTrainedTokenizerBase) -> _Pool:
    windows = _windows(text, tokenizer)
    return _Pool(windows=windows, length=len(windows), mixed=False)


def _sampled_pool(pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int) -> _Pool:
    """Windows for calibration and holding out from the first pieces that have any: one of each piece, and where that
    is not enough the pieces' others after them."""
    needed = max(4 * HELDOUT_WINDOWS, HELDOUT_WINDOWS + wanted)
    firsts: list[Tensor] = []
    others: list[Tensor] = []
    seen = 0  # characters of the pieces of the least sample, which is the same however many tokens are wanted
    least = 0
    for piece in itertools.takewhile(lambda _: len(firsts) < needed, pieces):
        windows = _windows(piece, tokenizer)
        firsts.extend(windows[:1])
        if len(others) < needed:
            others.extend(windows[1:])
        if len(firsts) <= 4 * HELDOUT_WINDOWS:
            seen, least = seen + len(piece), least + len(windows)
    # Larger texts share as one of the limit does: more of them would leave next to nothing for the others.
    length = max(1, LIMIT * least // max(1, seen))
    chosen = [*firsts, *others][:needed]
    windows = torch.stack(chosen) if chosen else torch.zeros((0, WINDOW), dtype=torch.int64)
    return _Pool(windows=windows, length=max(length, len(windows)), mixed=True)


def _interleave(pools: Iterable[_Pool]) -> Tensor:
    """One window of each pool in turn, as often as the pools are long, until all are spent."""
    keyed = [
        (index / pool.length, number, window)
        for number, pool in enumerate(pools)
        for index, window in enumerate(pool.windows)
    ]
    keyed.sort(key=lambda item: item[:2])
    return torch.stack([window for _, _, window in keyed])


def _windows(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(n, 512) token ids: the text as one stream, each window opened with the model's start token where it has one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # A model that its tokenizer gives start tokens expects them in front of everything.
    opened, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    start: list[int] = next((opened[:at] for at in range(len(opened)) if opened[at : at + len(bare)] == bare), [])
    body = WINDOW - len(start)
    count = len(ids) // body
    stream = torch.tensor(ids[: count * body], dtype=torch.int64).reshape(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, len(start)), stream], dim=1)
