"""Text to windows: every format, and what is wrong with a file said in one line."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_tokenizer, random_text
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from packager.errors import CalibrationError
from packager.source import calibration_text
from packager.source.calibration_text import WINDOW, CalibrationText, built_in_text, load_calibration, text_windows

COLUMNS = "expected a column 'text' or 'content' or 'messages' or 'conversations' or 'conversation'"
TEXT = random_text(5, 4500)


def load(*paths: Path, tokenizer: PreTrainedTokenizerFast, tokens: int = 2048, seed: int = 0) -> CalibrationText:
    return load_calibration(paths, tokenizer, tokens=tokens, seed=seed)


def message(path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    with pytest.raises(CalibrationError) as caught:
        load(path, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_windows_and_held_out_windows_are_disjoint_pieces_of_the_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    found = load(path, tokenizer=tokenizer)
    assert found.windows.shape == (4, WINDOW)
    assert found.heldout.shape[1] == WINDOW
    assert found.description == "some.txt"
    rows = [tuple(row.tolist()) for row in torch.cat([found.windows, found.heldout])]
    assert len(set(rows)) == len(rows)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pieces = {tuple(ids[start : start + WINDOW]) for start in range(0, len(ids), WINDOW)}
    assert set(rows) <= pieces


def test_all_formats_hold_the_same_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    paragraphs = [TEXT[start : start + 700] for start in range(0, len(TEXT), 700)]
    plain, lines, table = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"
    plain.write_text("\n\n".join(paragraphs), encoding="utf-8")
    lines.write_text("\n\n".join(json.dumps({"text": part, "id": 3}) for part in paragraphs) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(paragraphs))), "text": paragraphs}), table)
    found = {load(path, tokenizer=tokenizer).sha256 for path in (plain, lines, table)}
    assert len(found) == 1


def test_same_seed_same_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    first, again, other = (load(path, tokenizer=tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.windows, again.windows)
    assert first.sha256 == again.sha256
    assert not torch.equal(first.windows, other.windows)
    assert first.sha256 != other.sha256


def test_several_texts_share_the_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    paths[0].write_text(TEXT, encoding="utf-8")
    paths[1].write_text("0123456789 " * 3000, encoding="utf-8")
    found = load(*paths, tokenizer=tokenizer, tokens=3072)
    assert found.description == "one.txt, two.txt"
    digits = set(tokenizer("0123456789 0123456789 ", add_special_tokens=False)["input_ids"])
    for part in (found.windows, found.heldout):
        numeric = sum(len(set(row.tolist()) - digits) == 0 for row in part)
        assert 0 < numeric < len(part)


def test_a_start_token_opens_every_window_where_the_tokenizer_gives_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    found = load(path, tokenizer=tokenizer)
    assert found.windows.shape[1] == WINDOW
    assert set(found.windows[:, 0].tolist()) == {0}
    assert 0 not in found.windows[:, 1:]


def test_the_built_in_text_is_long_and_plain(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(built_in_text()) > 300_000
    found = load(tokenizer=tokenizer)
    assert found.description == "built-in text (CPython's language reference)"
    assert (len(found.windows), len(found.heldout)) == (4, 8)


def test_fewer_tokens_than_asked_is_what_there_is(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    found = load(path, tokenizer=tokenizer, tokens=10**6)
    total = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) // WINDOW
    assert len(found.windows) + len(found.heldout) == total


def test_too_short_says_what_is_missing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A few words.", encoding="utf-8")
    expected = (
        "calibration text short.txt is too short: 0 windows of 512 tokens, expected at least 4; add "
        "text with --calibration"
    )
    assert message(path, tokenizer) == expected


def test_empty_missing_and_binary(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.txt"
    assert message(path, tokenizer) == f"calibration text {path} does not exist"
    for content in ("", " \n\t\n"):
        path.write_text(content)
        assert message(path, tokenizer) == f"calibration text {path} is empty"
    path.write_bytes(b"abc\xff\xfe")
    assert message(path, tokenizer) == (
        f"calibration text {path} cannot be read as UTF-8 text: byte 0xff at position 3: invalid start byte"
    )


def test_damaged_and_foreign_tables(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.parquet"
    path.write_bytes(b"no table at all")
    assert message(path, tokenizer).startswith(f"{path} is not a readable Parquet file: ")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert message(path, tokenizer) == f"{path} has columns ['body']: {COLUMNS}"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    assert message(path, tokenizer) == f"{path}: its column 'text' holds int64: expected text"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert message(path, tokenizer) == f"calibration text {path} is empty"
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT]}), whole)
    path.write_bytes(whole.read_bytes()[:-20])
    assert message(path, tokenizer).startswith(f"{path} is not a readable Parquet file: ")
    assert message(tmp_path / "no.parquet", tokenizer) == f"calibration text {tmp_path / 'no.parquet'} does not exist"


def test_missing_values_of_a_table_are_passed_over(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, None, "x"]}), path)
    assert len(load(path, tokenizer=tokenizer).windows) == 4


def big_text(size: int) -> str:
    """Numbered sentences, all different, of about `size` characters."""
    sentence = random_text(7, 12)
    return "\n".join(f"{number} {sentence}" for number in range(10_000, 10_000 + size // (len(sentence) + 8)))


@pytest.mark.parametrize("kind", ["txt", "one line", "jsonl", "csv", "txt.gz", "parquet", "folder"])
def test_of_a_large_text_pieces_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packager.source.text_samples.LIMIT", 500_000)
    text = big_text(1_500_000)
    records = text.split("\n")
    path = tmp_path / f"some.{kind.replace('one line', 'txt')}"
    match kind:
        case "txt":
            path.write_text(text, encoding="utf-8")
        case "one line":
            path.write_text(text.replace("\n", " ").replace(" water ", " wäter "), encoding="utf-8")
        case "jsonl":
            path.write_text("\n".join(json.dumps({"text": record}) for record in records), encoding="utf-8")
        case "csv":
            path.write_text("id,text\n" + "\n".join(f'3,"{record}"' for record in records), encoding="utf-8")
        case "txt.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": records}), path)
        case "folder":
            path.mkdir()
            for number in range(3):
                (path / f"{number}.txt").write_text("\n".join(records[number::3]), encoding="utf-8")
    longest = 0

    def watched(text: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
        nonlocal longest
        longest = max(longest, len(text))
        return windows(text, tokenizer)

    windows = calibration_text._windows
    monkeypatch.setattr(calibration_text, "_windows", watched)
    found = load(path, tokenizer=tokenizer, tokens=10_240, seed=3)
    assert longest <= 65_536
    assert found.windows.shape == (20, WINDOW)
    assert found.heldout.shape == (8, WINDOW)
    rows = [tuple(row.tolist()) for row in torch.cat([found.windows, found.heldout])]
    assert len(set(rows)) == len(rows)
    # Windows of different places, and held out and seen ones share no sentence.
    numbers = [set(re.findall(r"\b\d{5}\b", tokenizer.decode(row))) for row in rows]
    assert len(set().union(*numbers)) > 100
    inner = [part - {max(part, key=int), min(part, key=int)} for part in numbers]
    assert not set().union(*inner[:20]) & set().union(*inner[20:])
    # The same seed chooses the same, more tokens add to it, and another seed chooses others.
    assert load(path, tokenizer=tokenizer, tokens=10_240, seed=3).sha256 == found.sha256
    more = load(path, tokenizer=tokenizer, tokens=40_960, seed=3)
    assert torch.equal(more.windows[:20], found.windows)
    assert torch.equal(more.heldout, found.heldout)
    assert load(path, tokenizer=tokenizer, tokens=10_240, seed=4).sha256 != found.sha256


def test_a_large_text_beside_a_small_one_leaves_it_a_share(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packager.source.text_samples.LIMIT", 200_000)
    monkeypatch.setattr(calibration_text, "LIMIT", 200_000)
    paths = [tmp_path / "large.txt", tmp_path / "small.txt"]
    paths[0].write_text(big_text(1_000_000), encoding="utf-8")
    paths[1].write_text("zyx " * 30_000, encoding="utf-8")
    found = load(*paths, tokenizer=tokenizer, tokens=20_480)
    small = sum("zyx zyx" in tokenizer.decode(row) for row in found.windows)
    assert 4 < small < 30


def test_conversations_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": TEXT[:9000]}, {"role": "assistant", "content": TEXT[9000:]}]
    path, plain = tmp_path / "chat.jsonl", tmp_path / "plain.txt"
    path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    plain.write_text(f"user: {TEXT[:9000]}\nassistant: {TEXT[9000:]}\n", encoding="utf-8")
    assert load(path, tokenizer=tokenizer).sha256 == load(plain, tokenizer=tokenizer).sha256
    bare = make_tokenizer()
    bare.chat_template = None
    assert message(path, bare) == (
        f"{path}, line 1: a conversation, and the model has no chat template to write it with: give plain text, or a "
        "field 'text'"
    )
    bare.chat_template = "{{ raise_exception('roles must\n alternate') }}"
    assert message(path, bare) == (
        f"{path}, line 1: the model's chat template does not take this conversation (roles must): repair it or leave "
        "it out"
    )


def test_the_first_windows_of_a_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    found = text_windows(path, tokenizer, 3)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert found.flatten().tolist() == ids[: 3 * WINDOW]
    path.write_text("short", encoding="utf-8")
    with pytest.raises(CalibrationError, match="is too short: expected at least one window of 512 tokens"):
        text_windows(path, tokenizer, 3)
