"""JSON that says one thing: read within bounds of size and depth, no key twice, no NaN, no half of a character.

Two readers of the same text that take different ones of two equal keys see two files; a number that is none spreads;
a lone surrogate cannot be written again. A file with any of these is damaged, or made to harm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError

LIMIT_BYTES = 256 << 20
"""More than the largest vocabulary's tokenizer.json, or the digests of the largest map."""


def strict_json(content: bytes | str) -> Any:
    """The value in `content`. ValueError where it is not JSON of one meaning or is nested too deep."""
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text or "\\uD" in text or not isinstance(content, bytes):
            # Escapes may spell half of a character; nothing else in UTF-8 can.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half of a character stands alone") from None
    return value


def read_object(path: Path, limit_bytes: int = LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; ArtifactError names the file when it is missing, too large, or is not one."""
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise ValueError(f"it has more than {limit_bytes} bytes")
        value = strict_json(content)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: the folder is incomplete, make it again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not readable JSON ({str(error)[:200]}): the file is damaged, make it again"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        again = next(key for number, key in enumerate(names) if key in names[:number])
        raise ValueError(f"the key {ascii(again)[:80]} stands twice")
    return found


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is no finite number")
    return value
