"""Finished measurements in one small file, so that a run that was killed does not make them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packager.io.files import dump_json, read_json, write_text


class Ledger:
    """Pairs of numbers by key, kept in the JSON file `path`, which is replaced in one step as each is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = read_json(path) if path.is_file() else {}

    def recall(self, key: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """What was measured under `key` before, in this run or an earlier one; else what `measure` gives now."""
        if key not in self._found:
            self._found[key] = measure()
            write_text(self._path, dump_json(self._found))
        first, second = self._found[key]
        return float(first), float(second)
