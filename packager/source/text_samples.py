"""A text whole where it is small, and otherwise pieces from all over it, in an order that a seed decides.

To tokenise takes some 180 bytes of memory for each character, and a few hundred windows are wanted. So of a text of
more than LIMIT characters only pieces are read. A file of lines or of plain text is read at random places; what can
only be read from its beginning (compressed, tables, folders) is read through once, keeping pieces of it by chance.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from packager.errors import CalibrationError
from packager.source.text_files import (
    LONGEST_LINE,
    SEPARATOR,
    fragments,
    is_lines,
    is_plain,
    line_text,
    plain_text,
)
from packager.source.text_records import Render

LIMIT = 4_000_000
"""Characters of the largest text that is read whole."""
PIECE = 16_384
"""Bytes (of plain text) or characters (of records) of a piece: some ten windows of tokens."""
_KEPT = 1024
_LONGEST_PIECE = 4 * PIECE
_LARGEST_STEP = 1 << 20


def read_sample(path: Path, what: str, render: Render, seed: int) -> str | Iterator[str]:
    """The text of `path` where it has at most LIMIT characters; else disjoint pieces of it in an order that `seed`
    decides, each at most 65,536 characters. CalibrationError for what cannot be read or is empty."""
    stream = fragments(path, what, render)
    read: list[str] = []
    size = 0
    for fragment in stream:
        read.append(fragment)
        size += len(fragment)
        if size > LIMIT:
            break
    if size <= LIMIT:
        text = "".join(read)
        if not text.strip():
            raise CalibrationError(f"{what} {path} is empty")
        return text
    if is_lines(path):
        return _lines(path, what, render, seed)
    if is_plain(path):
        return _plain(path, what, seed)
    return iter(_kept(_pieces(itertools.chain(read, stream)), seed))


def read_beginning(path: Path, what: str, render: Render, characters: int) -> str:
    """The first `characters` of the text of `path`. CalibrationError for what cannot be read or is empty."""
    read, size = [], 0
    for fragment in fragments(path, what, render):
        read.append(fragment)
        size += len(fragment)
        if size >= characters:
            break
    text = "".join(read)[:characters]
    if not text.strip():
        raise CalibrationError(f"{what} {path} is empty")
    return text


def _order(count: int, seed: int) -> Iterator[int]:
    return iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist())


def _plain(path: Path, what: str, seed: int) -> Iterator[str]:
    """Pieces of a plain text, from line to line where it has lines that short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in _order(-(-size // PIECE), seed):
            start = number * PIECE
            file.seek(start)
            content = file.read(PIECE)
            if start:
                skipped = content.find(b"\n") + 1
                if not 0 < skipped <= len(content) // 2:
                    # A character's bytes that follow its first are 10xxxxxx, three of them at most.
                    skipped = next(
                        (place for place, byte in enumerate(content[:4]) if byte >> 6 != 2), len(content[:3])
                    )
                content, start = content[skipped:], start + skipped
            if start + len(content) < size:
                end = content.rfind(b"\n") + 1
                content = content[:end] if end > len(content) // 2 else _whole_characters(content)
            yield plain_text(content, path, what, start).removeprefix("\ufeff" if number == 0 else "")


def _whole_characters(content: bytes) -> bytes:
    """`content` without the bytes of a character that it breaks off in."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >> 6 == 2:
            continue
        length = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
        return content if length <= back else content[:-back]
    return content


def _lines(path: Path, what: str, render: Render, seed: int) -> Iterator[str]:
    """Pieces of JSON lines: the texts of the lines that begin within a step of bytes."""
    size = path.stat().st_size
    # Steps grow with the file, so that long lines leave few of them empty.
    step = min(max(PIECE, size // 4096), _LARGEST_STEP)
    with path.open("rb") as file:
        for number in _order(-(-size // step), seed):
            start, end = number * step, min(size, (number + 1) * step)
            if start:
                file.seek(start - 1)
                file.readline(LONGEST_LINE)  # the end of a line that begins before
            else:
                file.seek(3 if file.read(3) == b"\xef\xbb\xbf" else 0)
            texts: list[str] = []
            while (place := file.tell()) < end and sum(map(len, texts)) < _LONGEST_PIECE:
                line = file.readline(LONGEST_LINE)
                if len(line) == LONGEST_LINE:
                    raise CalibrationError(f"{path}: the line at byte {place} is longer than {LONGEST_LINE >> 20} MiB")
                if text := line_text(line, f"{path}, the line at byte {place}", render):
                    texts.append(text)
            if texts:
                yield SEPARATOR.join(texts)[:_LONGEST_PIECE]


def _pieces(stream: Iterable[str]) -> Iterator[str]:
    """A text's fragments cut, or joined, into pieces of PIECE characters; the last may be shorter."""
    waiting: list[str] = []
    size = 0
    for fragment in stream:
        waiting.append(fragment)
        size += len(fragment)
        if size >= PIECE:
            joined = "".join(waiting)
            whole = size // PIECE * PIECE
            for start in range(0, whole, PIECE):
                yield joined[start : start + PIECE]
            waiting, size = [joined[whole:]], size - whole
    if size:
        yield "".join(waiting)


def _kept(pieces: Iterable[str], seed: int) -> list[str]:
    """1,024 of the pieces, each as likely as any other (Vitter's algorithm R), in an order that is as much chance."""
    generator = random.Random(seed)
    kept: list[str] = []
    for number, piece in enumerate(pieces):
        if number < _KEPT:
            kept.append(piece)
        elif (slot := generator.randrange(number + 1)) < _KEPT:
            kept[slot] = piece
    generator.shuffle(kept)
    return kept
