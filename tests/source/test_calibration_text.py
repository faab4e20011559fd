"""Text to windows: every format, and what is wrong with a file said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_tokenizer, random_text
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from packager.errors import CalibrationError
from packager.source.calibration_text import WINDOW, CalibrationText, built_in_text, load_calibration

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
    assert message(path, tokenizer).startswith(
        f"calibration text {path} cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xff"
    )
    assert message(tmp_path, tokenizer).startswith(f"calibration text {tmp_path} cannot be read as UTF-8 text: ")


@pytest.mark.parametrize("line", ["{", '{"body": "x"}', "[1]", "3", '"text"', "null", '{"text": 3}', '{"text": null}'])
def test_a_malformed_line_is_numbered(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n", encoding="utf-8")
    assert message(path, tokenizer) == f"{path}, line 3: expected a JSON object with a field 'text' of text"


def test_damaged_and_foreign_tables(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "some.parquet"
    path.write_bytes(b"no table at all")
    assert message(path, tokenizer).startswith(f"{path} is not a readable Parquet file: ")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert message(path, tokenizer) == f"{path} has columns ['body']: expected a column 'text'"
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
