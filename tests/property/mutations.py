"""Valid files, damaged at random: bits flipped, pieces cut out, values of JSON replaced by hostile ones."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

SURROGATE = "\\ud800"
HOSTILE = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "9" * 400, "9" * 5000, "1" + "0" * 18, "1e-320", '""', "[]",
    "{}", "null", "true", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, '"' + "x" * 100_000 + '"',
    f'"{SURROGATE}"', '"\\u0000"', '"\\u001b[31m"', '"../../etc/passwd"', '"/etc/passwd"', "[[]]", "[null]", "0.5",
    '"q9g9"', '"r99999999.q8g32"', '"nan"', "2147483648", "-9223372036854775809", '{"a":1,"a":2}',
    "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
]  # fmt: skip


def pieces(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values within a value of JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from pieces(inner, (*path, key))


def damaged_json(text: str, draw: random.Random) -> str:
    """JSON with one or two values replaced, taken away, renamed or said twice."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 2))):
        places = list(pieces(value))
        if not places:
            break
        *way, last = draw.choice(places)
        inside = value
        for key in way:
            inside = inside[key]
        kind = draw.randrange(5)
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw.choice(("surprise", "", "schema", "x" * 3000))] = inside.pop(last)
        elif kind == 2 and isinstance(inside, list):
            inside.insert(last, inside[last])
        else:
            inside[last] = f"@{draw.randrange(len(HOSTILE))}@"
    text = json.dumps(value)
    for number, hostile in enumerate(HOSTILE):
        text = text.replace(f'"@{number}@"', hostile)
    if draw.random() < 0.1 and (cut := text.find(",")) > 0:
        text = text[:cut] + "," + text[1 : cut + 1] + text[cut + 1 :]
    return text


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some changed, cut out, doubled or cut off."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        if not found:
            break
        # Heads matter more than what follows.
        at = draw.randrange(len(found) if draw.random() < 0.5 else min(len(found), 2000))
        kind = draw.randrange(6)
        if kind <= 1:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            found[at : at + 8] = draw.choice((b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 40), b"\x7f" * 8))
        elif kind == 3:
            del found[at : at + draw.randrange(1, 64)]
        elif kind == 4:
            found[at:at] = found[at : at + draw.randrange(1, 64)]
        else:
            del found[at:]
    return bytes(found)


def damaged_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header was damaged as JSON, its length put right; JSON within it likewise."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    if metadata and draw.random() < 0.6:
        key = draw.choice(sorted(metadata))
        with contextlib.suppress(ValueError):
            metadata[key] = damaged_json(metadata[key], draw)
        encoded = json.dumps(header).encode()
    else:
        encoded = damaged_json(json.dumps(header), draw).encode()
    return struct.pack("<Q", len(encoded)) + encoded + rest


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """As befits the kind of file, or any bytes."""
    if kind == "json" and draw.random() < 0.7:
        return damaged_json(content.decode(), draw).encode()
    if kind == "safetensors" and draw.random() < 0.6:
        return damaged_header(content, draw)
    if kind == "toml" and draw.random() < 0.7:
        lines = content.decode().splitlines()
        at = draw.randrange(len(lines))
        key = lines[at].partition("=")[0] or "x "
        lines[at] = f"{key}= {draw.choice([*HOSTILE, 'inf', '0x' + 'f' * 5000, '[' * 3000, '1979-05-27'])}"
        return "\n".join(lines).encode()
    return damaged_bytes(content, draw)
