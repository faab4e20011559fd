"""Two maps or two bundles, file by file: what is equal, what differs, and which keys or tensors of a file differ.

    python benchmarks/compare_artefacts.py OLD NEW [--ignore PATTERN …] [--json FILE]

It shows that a change left the artefacts as they were. Of JSON files it names the keys that differ, of safetensors
files the tensors and metadata; other files are compared by their bytes. PATTERNs (`*` stands for anything) name keys
and files that may differ: by default versions, hashes, and what validation measured. The exit status is 1 where
anything else differs, 2 where a folder is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common import make_parser, write_figures

from packager.io.files import sha256_file
from packager.io.safetensors_ranges import read_header, sha256_region

IGNORED = ("versions", "files", "*sha256", "measured", "rounds", "report.json", "report.html", "SHA256SUMS")
_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """`place` within `file` (a dotted key, a tensor's name, or empty for the file itself), and what is there."""

    file: str
    place: str
    found: str
    ignored: bool


def is_ignored(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether any of the names matches any of the patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def differing_values(old: Any, new: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys, from the outermost in, at which two JSON values differ, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differing_values(old.get(key, _MISSING), new.get(key, _MISSING), (*keys, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (first, second) in enumerate(zip(old, new, strict=True)):
            yield from differing_values(first, second, (*keys, str(number)))
    elif type(old) is not type(new) or old != new:
        yield keys, f"{_shown(old)} → {_shown(new)}"


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def differing_tensors(old: Path, new: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """The tensors at which two safetensors files differ, in type, shape or bytes, and the metadata that do."""
    (first, first_metadata), (second, second_metadata) = read_header(old), read_header(new)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield (name,), f"only in {old if name in first else new}"
            continue
        kinds = [f"{tensor.dtype}{list(tensor.shape)}" for tensor in (first[name], second[name])]
        if kinds[0] != kinds[1]:
            yield (name,), " → ".join(kinds)
        elif sha256_region(first[name].region) != sha256_region(second[name].region):
            yield (name,), f"other bytes, {kinds[0]}"
    for keys, values in differing_values(first_metadata, second_metadata):
        yield ("__metadata__", *keys), values


def differences_within(old: Path, new: Path) -> list[tuple[tuple[str, ...], str]]:
    """Where two files of other bytes differ; one entry without a place where nothing inside can be named."""
    if old.suffix == ".json":
        found = list(differing_values(*(json.loads(path.read_text(encoding="utf-8")) for path in (old, new))))
        return found or [((), "the same values, written in another way")]
    if old.suffix == ".safetensors":
        return list(differing_tensors(old, new)) or [((), "the same tensors, laid out in another way")]
    return [((), f"other bytes, {old.stat().st_size:,} → {new.stat().st_size:,}")]


def compare(old: Path, new: Path, ignore: Sequence[str] = IGNORED) -> tuple[list[str], list[Difference]]:
    """The files of both folders that are equal, and every difference of the others."""
    equal: list[str] = []
    differences: list[Difference] = []
    found: list[tuple[tuple[str, ...], str]]
    files = [{path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} for root in (old, new)]
    for name in sorted(files[0] | files[1]):
        if name not in files[0] or name not in files[1]:
            found = [((), f"only in {old if name in files[0] else new}")]
        elif sha256_file(old / name) == sha256_file(new / name):
            equal.append(name)
            continue
        else:
            found = differences_within(old / name, new / name)
        names = (name, Path(name).name)
        for keys, values in found:
            ignored = is_ignored([*names, *keys], ignore)
            differences.append(Difference(file=name, place=".".join(keys), found=values, ignored=ignored))
    return equal, differences


def main() -> int:
    parser = make_parser(__doc__, json=None)
    parser.add_argument("old", type=_folder, metavar="OLD", help="a map or a bundle")
    parser.add_argument("new", type=_folder, metavar="NEW", help="the one to hold against it")
    parser.add_argument(
        "--ignore",
        nargs="+",
        metavar="PATTERN",
        default=IGNORED,
        help=f"keys and files that may differ (default: {' '.join(IGNORED)})",
    )
    arguments = parser.parse_args()

    equal, differences = compare(arguments.old, arguments.new, arguments.ignore)
    for name in equal:
        print(f"equal    {name}")
    for difference in differences:
        place = f"{difference.file}: {difference.place}" if difference.place else difference.file
        print(f"{'ignored' if difference.ignored else 'DIFFERS'}  {place}: {difference.found}")
    counted = sum(not difference.ignored for difference in differences)
    print(f"{len(equal)} files equal, {counted} differences, {len(differences) - counted} ignored")
    write_figures(arguments.json, {"equal": equal, "differences": [asdict(item) for item in differences]})
    return int(counted > 0)


def _folder(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"expected the folder of a map or bundle, found none at {text!r}")
    return path


if __name__ == "__main__":
    sys.exit(main())
