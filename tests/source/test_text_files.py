"""Text out of every kind of file, and each that holds none refused by what it is and where."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packager.errors import CalibrationError, PackagerError
from packager.source import text_samples
from packager.source.text_files import fragments
from packager.source.text_records import Conversation
from packager.source.text_samples import read_beginning, read_sample

WANTED = "a field 'text' or 'content' of text, or 'messages' or 'conversations' of turns"


def render(turns: Conversation) -> str:
    return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def text_of(path: Path) -> str:
    return "".join(fragments(path, "text", render))


def refusal(path: Path) -> str:
    with pytest.raises(CalibrationError) as caught:
        text_of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}, CHAT[1]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("a.txt", "\ufeffone", "one"),
        ("a.md", "# Title\n\n<html> in it", "# Title\n\n<html> in it"),
        ("a.py", "print('x')", "print('x')"),
        ("noname", "one", "one"),
        ("a.jsonl", '{"text": "a"}\n\n{"content": "b"}\n{"text": ""}\n{"text": null}\n', "a\n\nb"),
        ("a.JSONL", '{"text": "a"}', "a"),
        ("a.ndjson", '\ufeff{"text": "a"}', "a"),
        ("a.jsonl", json.dumps({"messages": CHAT}), "<user>Hi<assistant>Ho"),
        ("a.jsonl", json.dumps({"conversations": SHARE}), "<user>Hi<assistant>Ho"),
        ("a.jsonl", json.dumps({"messages": PARTS}), "<user>Hi<assistant>Ho"),
        ("a.jsonl", json.dumps({"messages": [*CHAT, {"role": "tool", "content": None}]}), "<user>Hi<assistant>Ho"),
        ("a.jsonl", json.dumps({"messages": []}) + '\n{"text": "a"}', "a"),
        ("a.json", '["a", {"text": "b"}, ""]', "a\n\nb"),
        ("a.json", '\ufeff{"data": [{"content": "a"}, "b"], "version": 1}', "a\n\nb"),
        ("a.json", '{"text": "a", "tags": [1]}', "a"),
        ("a.json", json.dumps([{"messages": CHAT}]), "<user>Hi<assistant>Ho"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "a\n\nb"),
        ("a.csv", 'id,text\n1,"a, ""x""\nline"\n2,\n\n3,b\n', 'a, "x"\nline\n\nb'),
        ("a.csv", "\ufeffContent;text\n1;a\n2;b\n", "a\n\nb"),
        ("a.TSV", "text\tid\na, b\t1\n", "a, b"),
        ("a.csv", 'messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n', "<user>Hi"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert text_of(path) == expected
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        packed = tmp_path / (name + suffix)
        packed.write_bytes(compress(content.encode()))
        assert text_of(packed) == expected


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
)
def test_columns_of_text(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "a.PARQUET"
    values = pyarrow.array(["a", None, "", "b", "a"], pyarrow.string()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"id": range(5), "text": values}), path)
    assert text_of(path) == "a\n\nb\n\na"


def test_columns_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, None, CHAT[:1]]}), path)
    assert text_of(path) == "<user>Hi<assistant>Ho\n\n<user>Hi"
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["x"]}), path)
    assert refusal(path) == f"{path}: its column 'messages' holds string: expected text"


def test_a_folder_is_the_texts_in_it(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"text {tmp_path} is a folder without texts: expected files ending in .csv, ")
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "sub" / "c.md").write_text("c")
    for name in (".hidden.txt", "picture.png", "code.py"):
        (tmp_path / name).write_text("not this")
    assert text_of(tmp_path) == "a\n\nb\n\nc"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", ", column 2: not JSON (Expecting property name"),
        ('{"body": "x"}', f": expected a JSON object with {WANTED}, found the fields ['body']"),
        ("{}", f": expected a JSON object with {WANTED}, found an object without fields"),
        ("[1]", f": expected a JSON object with {WANTED}, found a list"),
        ("3", f": expected a JSON object with {WANTED}, found a number"),
        ('"text"', f": expected a JSON object with {WANTED}, found a string"),
        ("null", f": expected a JSON object with {WANTED}, found null"),
        ('{"text": 3}', ": field 'text' holds a number: expected text"),
        ('{"messages": "x"}', ": field 'messages' holds a string: expected a list of turns"),
        (
            '{"messages": ["x"]}',
            ": messages[0]: expected a turn with 'role' and 'content' (or 'from' and 'value') of text",
        ),
        ('{"messages": [{"role": 3, "content": "x"}]}', ": messages[0]: expected a turn with"),
        ("[" * 100_000, ": JSON nested too deeply to be read"),
        ('{"text": "\xff"}', ": not UTF-8 text: "),
    ],
)
def test_a_malformed_line_is_numbered(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + content.encode("latin-1") + b"\n")
    assert refusal(path).startswith(f"{path}, line 3{said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"a": [', ", line 1, column 8: not JSON (Expecting value)"),
        (
            "a.json",
            '{"a": [1], "b": [2]}',
            ": expected a list of texts or records, or an object that holds one such list",
        ),
        ("a.json", '["a", 3]', f", [1]: expected a JSON object with {WANTED}, found a number"),
        ("a.json", '{"rows": [{"body": 1}]}', f", rows[0]: expected a JSON object with {WANTED}, found the fields"),
        ("a.csv", "id,body\n1,a\n", " has columns ['id', 'body']: expected a column 'text' or 'content' or"),
        ("a.csv", "", " has columns []: expected a column"),
        ("a.csv", "id,text\n1\n", ", line 2: a row of 1 columns: expected 2"),
        ("a.csv", 'text\n"a"b\n', ", line 2: not a table ("),
        ("a.csv", "messages\nx\n", ", line 2: column 'messages' holds no JSON ("),
    ],
)
def test_malformed_files_are_placed(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert refusal(path).startswith(f"{path}{said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"abc\0def", "is no text: it holds a NUL byte at position 3"),
        ("a.txt", b"abc\xffdef", "cannot be read as UTF-8 text: byte 0xff at position 3: invalid start byte"),
        ("a.txt", b"abc\xe2\x82", "cannot be read as UTF-8 text: byte 0xe2 at position 3: unexpected end of data"),
        ("a.txt", "abc".encode("utf-16"), "is UTF-16: convert it (iconv -f UTF-16 -t UTF-8)"),
        ("a", b"\x1f\x8b\x08", "is gzip without its suffix: rename it to end in .gz"),
        ("a", b"PAR1....", "is a Parquet table without its suffix: rename it to end in .parquet"),
        ("a.txt", b"%PDF-1.7", "is a PDF: save its text as .txt"),
        ("a", b" <!DOCTYPE html>", "is a page of markup: save its text as .txt"),
        ("a.dat", b"\xef\xbb\xbf<?xml version", "is a page of markup: save its text as .txt"),
        ("a.html", b"x", "is a page of markup: save its text as .txt"),
        ("a.jsonl.zst", b"x", "is compressed by zstd: unpack it first (zstd -d)"),
        ("a.zip", b"x", "is a zip archive: unpack it first"),
        ("a.docx", b"x", "is a word processor's file: save its text as .txt"),
        ("a.pkl", b"x", "is a pickle, which can run code when read: save its text as .jsonl"),
        ("a.ipynb", b"x", "is a notebook: save its text as .txt"),
        ("a.parquet.gz", b"x", "is a compressed Parquet table: unpack it first"),
        ("a.txt.gz", b"x", "cannot be unpacked: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"abc" * 1000)[:-9], "cannot be unpacked: Compressed file ended before"),
        ("a.txt.xz", b"x", "cannot be unpacked: Input format not supported"),
        ("a.csv", b"text\n\xff\n", "cannot be read as UTF-8 text: "),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path).startswith(f"text {path} {said}")


@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt.gz", "a.zip"])
def test_what_is_missing(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"text {tmp_path / name} does not exist"


def test_a_json_document_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["a" * (33 << 20)]))
    assert refusal(path) == (
        f"{path} is a JSON document of more than 32 MiB, which has to be read whole: write it as JSON lines (.jsonl), "
        "a record a line"
    )


def test_a_character_across_two_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "€€".encode())
    assert text_of(path).endswith("a€€")
    path.write_bytes(b"a" * ((1 << 20) - 1) + b"\xe2\x82x")
    assert f"byte 0xe2 at position {(1 << 20) - 1}: " in refusal(path)


def test_a_large_text_is_checked_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words\n" * 400_000 + b"\0" + b"some words\n" * 400_000)
    pieces = read_sample(path, "text", render, 0)
    assert not isinstance(pieces, str)
    with pytest.raises(CalibrationError, match="it holds a NUL byte at position 4400000"):
        list(pieces)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "some words"}\n' * 500_000 + b'{"body": 1}\n' + b'{"text": "some words"}\n' * 500_000)
    pieces = read_sample(path, "text", render, 0)
    with pytest.raises(CalibrationError, match="the line at byte 11500000: expected a JSON object with"):
        list(pieces)


def test_the_beginning_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\nnot JSON')
    assert read_beginning(path, "text", render, 7) == "abc\n\nde"
    path.write_text('{"text": ""}\n')
    with pytest.raises(CalibrationError, match="is empty"):
        read_beginning(path, "text", render, 7)


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0\ufeff"), max_size=40), min_size=1),
    ends=st.sampled_from(["\n", ""]),
    seed=st.integers(0, 5),
)
@example(lines=["0\x80\x80\U00010000"] * 3, ends="\n", seed=0)  # the last piece is a part of a character
def test_pieces_are_the_text_and_overlap_nowhere(
    lines: list[str], ends: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What pieces leave out is at most what stands around their ends; no character is in two."""
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    text = ends.join(f"{number}:{line}" for number, line in enumerate(lines * 20))
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_samples, "LIMIT", 100)
        patch.setattr(text_samples, "PIECE", 256)
        try:
            pieces = read_sample(path, "text", render, seed)
        except CalibrationError as error:  # drawn to begin as a picture does, or as markup
            assert "text" in str(error)  # noqa: PT017  an error is not required
            return
        if isinstance(pieces, str):
            assert len(text) <= 100
            return
        left = text
        for piece in pieces:
            assert piece in text
            if left.count(piece) == 1:
                left = left.replace(piece, "\0")
        assert sum(map(len, text_samples.read_sample(path, "text", render, seed))) <= len(text)


@given(
    content=st.binary(max_size=200), name=st.sampled_from(["a", "a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.gz"])
)
def test_any_bytes_are_text_or_an_error_of_ours(
    content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        text_of(path)
    except PackagerError as error:
        assert "\n" not in str(error)  # noqa: PT017  an error is not required
