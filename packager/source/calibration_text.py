"""Calibration text: files to windows of tokens, some of them held out for measuring."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from packager.errors import CalibrationError

WINDOW = 512
HELDOUT_WINDOWS = 8
_LEAST_WINDOWS = 4
# In nats per byte, the one unit in which languages, vocabularies and models compare. A page each with the reference
# model: English, C and Python 0.5 to 0.75; seven languages it hardly saw 1.1 to 2.3; shuffled words 1.7; noise 2.4 to
# 5.
_UNFAMILIAR = 0.9
_MOST_CHARACTERS = 16_000_000
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
    """About `tokens` tokens in equal shares from each path, and held-out windows that calibration never sees.

    Raises CalibrationError for files that are missing, empty, malformed or together too short.
    """
    if paths:
        texts = [_read(path) for path in paths]
        description = ", ".join(path.name for path in paths)
    else:
        texts, description = [built_in_text()], "built-in text (CPython's language reference)"
    pools = [_windows(text, tokenizer) for text in texts]
    found = sum(len(pool) for pool in pools)
    if found < _LEAST_WINDOWS:
        raise CalibrationError(
            f"calibration text {description} is too short: {found} windows of {WINDOW} tokens, expected at least "
            f"{_LEAST_WINDOWS}; add text with --calibration"
        )
    heldout_count = min(HELDOUT_WINDOWS, found // 4)
    wanted = max(1, -(-tokens // WINDOW))
    generator = torch.Generator().manual_seed(seed)
    order = [pool[torch.randperm(len(pool), generator=generator)] for pool in pools]
    mixed = _interleave(order)
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
        f"with --calibration text of the "
        "model's own kind"
    )


def text_windows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """The first windows of a text, at most `count`: (n, 512) token ids. CalibrationError when there is not one."""
    windows = _windows(_read(path, "text")[: count * WINDOW * _MOST_TOKEN_CHARACTERS], tokenizer)[:count]
    if not len(windows):
        raise CalibrationError(f"text {path} is too short: expected at least one window of {WINDOW} tokens")
    return windows


def _interleave(pools: Iterable[Tensor]) -> Tensor:
    """One window of each pool in turn, until all are spent."""
    keyed = [
        (index / len(pool), number, window) for number, pool in enumerate(pools) for index, window in enumerate(pool)
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


def _read(path: Path, what: str = "calibration text") -> str:
    try:
        if path.suffix == ".parquet":
            text = "\n\n".join(_parquet_texts(path))
        elif path.suffix == ".jsonl":
            text = "\n\n".join(_jsonl_texts(path))
        else:
            text = path.read_text(encoding="utf-8")[:_MOST_CHARACTERS]
    except FileNotFoundError:
        raise CalibrationError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{what} {path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise CalibrationError(f"{what} {path} is empty")
    return text


def _jsonl_texts(path: Path) -> list[str]:
    texts, size = [], 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise CalibrationError(f"{path}, line {number}: expected a JSON object with a field 'text' of text")
            texts.append(text)
            size += len(texts[-1])
            if size > _MOST_CHARACTERS:
                break
    return texts


def _parquet_texts(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            raise CalibrationError(f"{path} has columns {table.schema_arrow.names}: expected a column 'text'")
        kind = table.schema_arrow.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise CalibrationError(f"{path}: its column 'text' holds {kind}: expected text")
        texts, size = [], 0
        for batch in table.iter_batches(columns=["text"], batch_size=1024):
            for value in batch.column(0).to_pylist():
                texts.append(value or "")
                size += len(texts[-1])
            if size > _MOST_CHARACTERS:
                break
        return texts
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {error}") from error
