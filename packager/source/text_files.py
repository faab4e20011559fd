"""Text out of the files that people keep text in, a fragment at a time, so that no file is held in memory whole.

Plain text, JSON lines, JSON, CSV and TSV, Parquet, each also under gzip, bzip2 or xz (but Parquet); a folder is the
texts of all such files below it. What is no text is refused by what it is.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from packager.errors import CalibrationError
from packager.source.text_records import FIELDS, WANTED, Render, field_text, record_text

SEPARATOR = "\n\n"
"""What stands between two records' texts."""
LONGEST_LINE = 64 << 20
_BLOCK = 1 << 20
_MOST_JSON = 32 << 20
_JSONL = (".jsonl", ".ndjson", ".jsonlines")
_TABLES = {".csv": ",", ".tsv": "\t"}
_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst", ".log", ".tex")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_REFUSED = {
    ".zst": "compressed by zstd: unpack it first (zstd -d)",
    ".zip": "a zip archive: unpack it first",
    ".tar": "an archive: unpack it first",
    ".tgz": "an archive: unpack it first",
    ".7z": "an archive: unpack it first",
    ".rar": "an archive: unpack it first",
    ".html": "a page of markup: save its text as .txt",
    ".htm": "a page of markup: save its text as .txt",
    ".xml": "markup: save its text as .txt",
    ".pdf": "a PDF: save its text as .txt",
    ".doc": "a word processor's file: save its text as .txt",
    ".docx": "a word processor's file: save its text as .txt",
    ".odt": "a word processor's file: save its text as .txt",
    ".rtf": "a word processor's file: save its text as .txt",
    ".epub": "an e-book: save its text as .txt",
    ".ipynb": "a notebook: save its text as .txt",
    ".xlsx": "a spreadsheet: save it as .csv",
    ".arrow": "an Arrow file: save it as .parquet",
    ".feather": "an Arrow file: save it as .parquet",
    ".pickle": "a pickle, which can run code when read: save its text as .jsonl",
    ".pkl": "a pickle, which can run code when read: save its text as .jsonl",
}
_SIGNATURES = {
    b"\x1f\x8b": "gzip without its suffix: rename it to end in .gz",
    b"\x28\xb5\x2f\xfd": _REFUSED[".zst"],
    b"PK\x03\x04": "a zip archive or an office document: save its text as .txt",
    b"%PDF": _REFUSED[".pdf"],
    b"PAR1": "a Parquet table without its suffix: rename it to end in .parquet",
    b"{\\rtf": _REFUSED[".rtf"],
    b"GGUF": "a model, not a text",
    b"\x7fELF": "a program, not a text",
    b"\x89PNG": "a picture, not a text",
    b"\xff\xd8\xff": "a picture, not a text",
    b"\xff\xfe": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: convert it (iconv -f UTF-16 -t UTF-8)",
}
_MARKUP = (b"<!doctype", b"<html", b"<?xml")


def fragments(path: Path, what: str, render: Render) -> Iterator[str]:
    """Pieces of text that joined are the text of `path`, a byte-order mark left out and line ends as "\\n".

    `what` names the text in messages; `render` turns conversations into text. CalibrationError says which file, and
    where in it, cannot be read.
    """
    if path.is_dir():
        yield from _folder(path, what, render)
        return
    try:
        yield from _file(path, what, render)
    except FileNotFoundError:
        raise CalibrationError(f"{what} {path} does not exist") from None
    except PermissionError:
        raise CalibrationError(f"{what} {path} cannot be read: you have no permission to (chmod u+r)") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{what} {path} cannot be read as UTF-8 text: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{what} {path} cannot be unpacked: {error}: it is damaged or cut short") from error
    except OSError as error:
        raise CalibrationError(f"{what} {path} cannot be read: {error}") from error


def is_lines(path: Path) -> bool:
    """Whether `path` is JSON lines, not compressed."""
    return path.suffix.lower() in _JSONL


def is_plain(path: Path) -> bool:
    """Whether `path` is plain text, not compressed."""
    suffix = path.suffix.lower()
    return path.is_file() and suffix not in {*_JSONL, *_TABLES, *_OPENERS, ".json", ".parquet"}


def line_text(line: bytes, where: str, render: Render) -> str:
    """The text of one line of JSON lines; "" for an empty line or field."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.rstrip())
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: not UTF-8 text: {error}") from None
    except RecursionError:
        raise CalibrationError(f"{where}: JSON nested too deeply to be read") from None
    except ValueError as error:
        place = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise CalibrationError(f"{where}{place}: not JSON ({reason}): expected a JSON object with {WANTED}") from None
    return record_text(record, where, render)


def plain_text(content: bytes, path: Path, what: str, start: int) -> str:
    """`content`, which stands at byte `start` of `path`, as text. CalibrationError names the byte that is none."""
    if (zero := content.find(b"\0")) >= 0:
        raise _binary(path, what, start + zero)
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{what} {path} cannot be read as UTF-8 text: byte 0x{content[error.start]:02x} at position "
            f"{start + error.start}: {error.reason}"
        ) from None


def _binary(path: Path, what: str, position: int) -> CalibrationError:
    return CalibrationError(f"{what} {path} is no text: it holds a NUL byte at position {position}")


def _folder(folder: Path, what: str, render: Render) -> Iterator[str]:
    """The texts of all files below `folder` whose suffix says that they hold text, in the order of their names."""
    known = {*_PLAIN, *_JSONL, *_TABLES, ".json", ".parquet"}
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and (_without_compression(file)[0] in known)
        and file.is_file()
    ]
    if not files:
        raise CalibrationError(
            f"{what} {folder} is a folder without texts: expected files ending in {', '.join(sorted(known))}"
        )
    for number, file in enumerate(files):
        yield SEPARATOR if number else ""
        yield from fragments(file, what, render)


def _without_compression(path: Path) -> tuple[str, Callable[..., Any] | None]:
    """The suffix that says what `path` holds, in lower case, and what opens it where it is compressed."""
    opener = _OPENERS.get(path.suffix.lower())
    return (Path(path.stem).suffix if opener else path.suffix).lower(), opener


def _file(path: Path, what: str, render: Render) -> Iterator[str]:
    suffix, opener = _without_compression(path)
    if path.suffix.lower() in _REFUSED or suffix in _REFUSED:
        reason = _REFUSED.get(path.suffix.lower()) or _REFUSED[suffix]
        if not path.exists():
            raise FileNotFoundError
        raise CalibrationError(f"{what} {path} is {reason}")
    if suffix == ".parquet":
        if opener:
            raise CalibrationError(f"{what} {path} is a compressed Parquet table: unpack it first")
        yield from _between(_parquet(path, render))
        return
    with opener(path, "rb") if opener else path.open("rb") as file:
        if suffix in _JSONL:
            yield from _between(_json_lines(file, path, render))
        elif suffix == ".json":
            yield from _between(_json(file, path, render))
        elif suffix in _TABLES:
            yield from _between(_table(file, path, _TABLES[suffix], render))
        else:
            yield from _plain(file, path, what, known=suffix in _PLAIN)


def _between(texts: Iterator[str]) -> Iterator[str]:
    """Texts that are not empty, with a separator between them."""
    first = True
    for text in texts:
        if text:
            yield text if first else SEPARATOR + text
            first = False


def _plain(file: IO[bytes], path: Path, what: str, *, known: bool) -> Iterator[str]:
    """Blocks of a plain text. A suffix that is not `known` for text may hide markup, which is looked for."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    position, waiting = 0, 0
    while True:
        block = file.read(_BLOCK)
        if position == 0:
            _refuse_signature(block, path, what, markup=not known)
            if block.startswith(codecs.BOM_UTF8):
                block = block[len(codecs.BOM_UTF8) :]
                position = len(codecs.BOM_UTF8)
        if (zero := block.find(b"\0")) >= 0:
            raise _binary(path, what, position + zero)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # Positions count from what the decoder had kept of the block before.
            found = position - waiting + error.start
            raise CalibrationError(
                f"{what} {path} cannot be read as UTF-8 text: byte 0x{error.object[error.start]:02x} at position "
                f"{found}: {error.reason}"
            ) from None
        waiting = len(decoder.getstate()[0])
        position += len(block)
        if text:
            yield text
        if not block:
            return


def _refuse_signature(head: bytes, path: Path, what: str, *, markup: bool) -> None:
    for signature, reason in _SIGNATURES.items():
        if head.startswith(signature):
            raise CalibrationError(f"{what} {path} is {reason}")
    if markup and head[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_MARKUP):
        raise CalibrationError(f"{what} {path} is {_REFUSED['.html']}")


def _json_lines(file: IO[bytes], path: Path, render: Render) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise CalibrationError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield line_text(line, f"{path}, line {number}", render)


def _json(file: IO[bytes], path: Path, render: Render) -> Iterator[str]:
    """The texts of a list of strings or records, of the one list that an object holds, or of the object itself."""
    content = file.read(_MOST_JSON + 1).removeprefix(codecs.BOM_UTF8)
    if len(content) > _MOST_JSON:
        raise CalibrationError(
            f"{path} is a JSON document of more than {_MOST_JSON >> 20} MiB, which has to be read whole: write it as "
            "JSON lines (.jsonl), a record a line"
        )
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        first, _, rest = content.partition(b"\n")
        if rest.strip() and _is_object(first):  # JSON lines under the name of JSON
            yield from _json_lines(io.BytesIO(content), path, render)
            return
        where = f", line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))[:200]
        raise CalibrationError(f"{path}{where}: not JSON ({reason})") from None
    records, place = value, ""
    if isinstance(value, dict) and not any(field in value for field in FIELDS):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise CalibrationError(
                f"{path}: expected a list of texts or records, or an object that holds one such list, found an object "
                f"with {len(lists)} lists"
            )
        records, place = value[lists[0]], lists[0]
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        where = f"{path}, {place}[{number}]"
        yield record if isinstance(record, str) else record_text(record, where, render)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _table(file: IO[bytes], path: Path, delimiter: str, render: Render) -> Iterator[str]:
    """The column of text of a table whose first row names its columns; semicolons too may separate a .csv."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        first = text.readline(LONGEST_LINE)
        if delimiter == "," and ";" in first and "," not in first:
            delimiter = ";"
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        column = next((field for field in FIELDS if field in names), None)
        if column is None:
            raise CalibrationError(
                f"{path} has columns {names[:8]}: expected a column {' or '.join(map(repr, FIELDS))}"
            )
        rows, place = csv.reader(text, delimiter=delimiter, strict=True), names.index(column)
        try:
            for row in rows:
                if not row:
                    continue
                where = f"{path}, line {rows.line_num + 1}"
                if len(row) <= place:
                    raise CalibrationError(f"{where}: a row of {len(row)} columns: expected {len(names)}")
                value: Any = row[place]
                if column not in ("text", "content") and value:
                    value = _cell(value, column, where)
                yield field_text(value, column, where, render)
        except csv.Error as error:
            raise CalibrationError(f"{path}, line {rows.line_num + 1}: not a table ({error})") from None
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _cell(value: str, column: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{where}: column {column!r} holds no JSON ({error}): expected a list of turns"
        ) from None


def _parquet(path: Path, render: Render) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    if not path.exists():
        raise FileNotFoundError
    types = pyarrow.types
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        column = next((field for field in FIELDS if field in names), None)
        if column is None:
            raise CalibrationError(
                f"{path} has columns {names[:8]}: expected a column {' or '.join(map(repr, FIELDS))}"
            )
        kind = table.schema_arrow.field(column).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        string = types.is_string(plain) or types.is_large_string(plain) or types.is_string_view(plain)
        nested = types.is_list(plain) or types.is_large_list(plain)
        if not (string if column in ("text", "content") else nested):
            raise CalibrationError(f"{path}: its column {column!r} holds {kind}: expected text")
        row = 0
        for batch in table.iter_batches(columns=[column], batch_size=256):
            for value in batch.column(0).to_pylist():
                row += 1
                yield field_text(value, column, f"{path}, row {row}", render)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise CalibrationError(f"{path} is not a readable Parquet file: {_first(error)}") from error


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
