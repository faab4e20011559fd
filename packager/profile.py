"""Device profiles: what a target device has, and what a bundle for it is bounded to. TOML in, one frozen type out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

from packager.errors import ProfileError, UsageError
from packager.io.records import CONTROL, LARGEST, shown
from packager.sizes import parse_size

AUTO: Final = "auto"
FLOAT: Final = "float"
INT8: Final = "int8"
KV_CACHES = (AUTO, FLOAT, INT8)
"""What a key/value cache holds: floats, 8-bit codes, or whichever is predicted to lose less.

AUTO stands in place of a context's tokens too: the plan chooses them, see `planning.plan.context_frontier`.
"""
PROMPT_RESERVE = 32
"""Tokens of a context that are kept for the answer: the longest prompt is as much shorter."""
LEAST_CONTEXT_TOKENS = PROMPT_RESERVE + 1
"""The shortest context there is: one token of a prompt, and its answer."""
_MOST_CHARACTERS = 1 << 16
_MOST = (1 << 31) - 1
PROVIDERS = ("cpu", "cuda", "dml", "webgpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCoefficients:
    """How this kind of device's runtime turns a model into resident memory; see packager.memory.model for the formula.

    Every value is measured (docs/memory.md says how) on ONNX Runtime's CPU kernels of the machine that
    `measured_on` names, on that date, with those versions.
    """

    measured_on: str = "x86-64 with AVX512-VNNI"
    measured_date: str = "2026-11-22"
    onnxruntime: str = "1.31.1"
    onnxruntime_genai: str = "0.18.0"
    packager: str = "0.1.0"
    process_load_bytes: int = 65_600_000  # bytes: python, numpy, genai and an empty session while a model loads
    process_bytes: int = 66_200_000  # bytes: the same once it has run, with the code that running has paged in
    session_bytes_per_node: int = 11_600  # bytes per node of the graph
    packed_scale_copies: float = 2.22  # times the scales' bytes: in the packed weights, and the block sums beside them
    tokenizer_live_bytes_per_entry: int = 114  # bytes per token or merge: the tables in use
    tokenizer_freed_bytes_per_entry: int = 128  # bytes per token or merge: parsed and freed, still resident
    tokenizer_file_bytes_per_entry: int = 36  # bytes of tokenizer.json per token or merge, as transformers indents it
    reuse_ratio: float = 1.0  # share of the freed heap that the cache and the activations are put into
    kv_element_bytes: int = 4  # bytes per cached key or value element
    activation_copies: float = 4.2  # float rows of (hidden + intermediate) alive at once, per token of a chunk
    logit_copies: float = 3.0  # float rows of the vocabulary
    run_bytes: int = 3 * 2**20  # bytes per run, whatever its rows
    fault_bytes: int = 64 * 2**10  # bytes that one page fault on the mapped weights maps
    distinct_factor: float = 3.0  # f in f * n^e, the separate lookups of a text of n tokens
    distinct_exponent: float = 0.65  # e in f * n^e
    margin_bytes: int = 20 * 2**20  # bytes that a peak may exceed its prediction by, where nothing is measured

    @property
    def provenance(self) -> str:
        """Where, when and with what they were measured."""
        versions = (
            f"onnxruntime {self.onnxruntime}, onnxruntime-genai {self.onnxruntime_genai}, packager {self.packager}"
        )
        return f"{self.measured_on}; {self.measured_date}, {versions}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """A target device. Bytes are bytes, `context_tokens` counts prompt and answer together, `toml` is the file's text.

    `minimum_context_tokens` is what `--context auto` gives at least. `threads` 0 leaves their number to the runtime.
    `kv_cache` is the key/value cache: float, int8, or auto for whichever
    is predicted to lose less.
    """

    name: str
    description: str
    memory_bytes: int
    budget_bytes: int
    provider: str
    bits: tuple[int, ...]
    accuracy_level: int
    context_tokens: int
    minimum_context_tokens: int
    chunk_tokens: int
    threads: int
    coefficients: MemoryCoefficients
    toml: str
    kv_cache: str = AUTO


def profile_folder() -> Path:
    """Where the shipped profiles lie: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "profiles"
    return installed if installed.is_dir() else here.parent / "profiles"


def shipped_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in profile_folder().glob("*.toml"))


def load_profile(name_or_path: str) -> DeviceProfile:
    """A shipped profile by name, or any TOML file by path. ProfileError says what is wrong and where."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = profile_folder() / f"{name_or_path}.toml"
        if "/" in name_or_path or not path.is_file():
            known = shipped_profiles()
            near = difflib.get_close_matches(name_or_path, known, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"shipped profiles: {', '.join(known)}."
            raise ProfileError(f"profile {name_or_path!r} is unknown: {hint} A path to a .toml file works too.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"profile {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"profile {path} cannot be read: it is not UTF-8 text ({error})") from error
    return parse_profile(text, where=str(path), name=path.stem)


def parse_profile(text: str, *, where: str, name: str) -> DeviceProfile:
    """The profile that TOML `text` describes; `where` names it in errors."""
    if len(text) > _MOST_CHARACTERS:
        raise ProfileError(f"{where}: {len(text)} characters: expected a profile of at most {_MOST_CHARACTERS}")
    try:
        table = tomllib.loads(text)
    except ValueError as error:  # an integer of thousands of digits is one too
        raise ProfileError(f"{where}: not valid TOML: {str(error)[:200]}") from error
    except RecursionError:
        raise ProfileError(f"{where}: not valid TOML: nested too deep") from None
    device = _section(table, "device", where, {"description", "memory", "budget", "threads"})
    runtime = _section(table, "runtime", where, {"provider", "bits", "accuracy_level", "chunk_tokens", "kv_cache"})
    context = _section(table, "context", where, {"tokens", "minimum"})
    memory = _section(table, "memory", where, set(get_type_hints(MemoryCoefficients)), optional=True)
    if unknown := set(table) - {"device", "runtime", "context", "memory"}:
        raise ProfileError(
            f"{where}: unknown section [{sorted(unknown)[0]}]: expected [device], [runtime], [context], [memory]"
        )
    memory_bytes = _size(device, "memory", where, of_bytes=None)
    context_tokens = _typed(context, "tokens", int, where)
    profile = DeviceProfile(
        name=name,
        description=_typed(device, "description", str, where, default=""),
        memory_bytes=memory_bytes,
        budget_bytes=_size(device, "budget", where, of_bytes=memory_bytes),
        provider=_typed(runtime, "provider", str, where, default="cpu"),
        bits=tuple(_typed(runtime, "bits", list, where, default=[2, 4, 8])),
        accuracy_level=_typed(runtime, "accuracy_level", int, where, default=4),
        context_tokens=context_tokens,
        minimum_context_tokens=_typed(context, "minimum", int, where, default=context_tokens),
        chunk_tokens=_typed(runtime, "chunk_tokens", int, where, default=128),
        threads=_typed(device, "threads", int, where, default=0),
        coefficients=_coefficients(memory, where),
        toml=text,
        kv_cache=_typed(runtime, "kv_cache", str, where, default=AUTO),
    )
    _check(profile, where)
    return profile


def _check(profile: DeviceProfile, where: str) -> None:
    if profile.budget_bytes > profile.memory_bytes:
        raise ProfileError(
            f"{where}: device.budget {profile.budget_bytes} is more than device.memory {profile.memory_bytes}"
        )
    if profile.provider not in PROVIDERS:
        raise ProfileError(f"{where}: runtime.provider {profile.provider!r}: expected one of {', '.join(PROVIDERS)}")
    if profile.kv_cache not in KV_CACHES:
        raise ProfileError(f"{where}: runtime.kv_cache {profile.kv_cache!r}: expected one of {', '.join(KV_CACHES)}")
    if len(profile.bits) > 3 or any(type(bits) is not int or bits not in (2, 4, 8) for bits in profile.bits):
        raise ProfileError(
            f"{where}: runtime.bits {shown(list(profile.bits))}: expected some of 2, 4, 8 (none: float only)"
        )
    if not 0 <= profile.accuracy_level <= 4:
        raise ProfileError(f"{where}: runtime.accuracy_level {profile.accuracy_level}: expected 0 to 4")
    bounded = (
        ("context.tokens", profile.context_tokens, LEAST_CONTEXT_TOKENS),
        ("context.minimum", profile.minimum_context_tokens, LEAST_CONTEXT_TOKENS),
        ("runtime.chunk_tokens", profile.chunk_tokens, 1),
        ("device.threads", profile.threads, 0),
    )
    for key, value, least in bounded:
        if value < least:
            raise ProfileError(f"{where}: {key} {value}: expected at least {least}")
        if value > _MOST:
            raise ProfileError(f"{where}: {key} {value}: expected at most {_MOST}")
    if profile.minimum_context_tokens > profile.context_tokens:
        raise ProfileError(
            f"{where}: context.minimum {profile.minimum_context_tokens} is more than context.tokens "
            f"{profile.context_tokens}"
        )


def _section(table: dict[str, Any], key: str, where: str, known: set[str], *, optional: bool = False) -> dict[str, Any]:
    section = table.get(key, {} if optional else None)
    if not isinstance(section, dict):
        raise ProfileError(f"{where}: section [{key}] is missing")
    if unknown := sorted(set(section) - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ProfileError(
            f"{where}: unknown key {key}.{unknown[0]}"
            + (f": did you mean {near[0]}?" if near else f": expected {', '.join(sorted(known))}")
        )
    return section


def _typed(section: dict[str, Any], key: str, kind: type, where: str, *, default: Any = None) -> Any:
    value = section.get(key, default)
    if value is None:
        raise ProfileError(f"{where}: key {key!r} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProfileError(f"{where}: {key} is {shown(value)}: expected {kind.__name__}")
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ProfileError(f"{where}: {key} is {shown(value)}: expected at most {LARGEST}")
    if isinstance(value, str) and (found := CONTROL.search(value)) is not None:
        raise ProfileError(f"{where}: {key} holds the control character {found.group()!a}: expected text")
    return value


def _size(section: dict[str, Any], key: str, where: str, *, of_bytes: int | None) -> int:
    text = _typed(section, key, str, where)
    try:
        return parse_size(text, of_bytes=of_bytes)
    except UsageError as error:
        raise ProfileError(f"{where}: device.{key}: {error}") from None


def _coefficients(section: dict[str, Any], where: str) -> MemoryCoefficients:
    values: dict[str, Any] = {}
    for key, kind in get_type_hints(MemoryCoefficients).items():
        if key in section:
            value = section[key]
            if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
                value = float(value)
            if (
                not isinstance(value, kind)
                or isinstance(value, bool)
                or (kind is not str and not 0 <= value <= LARGEST)
                or (kind is str and CONTROL.search(value) is not None)
            ):
                raise ProfileError(f"{where}: memory.{key} is {shown(value)}: expected a {kind.__name__}, not negative")
            values[key] = value
    if values.get("reuse_ratio", 0) > 1:
        raise ProfileError(f"{where}: memory.reuse_ratio is {values['reuse_ratio']}: expected a share, at most 1")
    return dataclasses.replace(MemoryCoefficients(), **values)


def with_memory(profile: DeviceProfile, values: Mapping[str, str | int | float]) -> str:
    """The profile's TOML with `values` as its whole [memory] section; comments and order of the rest stay.

    ProfileError where the text holds the section in a way that cannot be replaced, such as an inline table.
    """
    lines, kept, inside = profile.toml.splitlines(), list[str](), False
    for line in lines:
        if line.lstrip().startswith("["):
            inside = line.split("#")[0].strip() == "[memory]"
        if not inside:
            kept.append(line)
    section = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    text = "\n".join([*kept, "", "[memory]", *section]).replace("\n\n\n", "\n\n") + "\n"
    found = parse_profile(text, where=f"{profile.name} with new coefficients", name=profile.name)
    expected = dataclasses.replace(profile, coefficients=dataclasses.replace(MemoryCoefficients(), **values), toml=text)  # type: ignore[arg-type]
    if found != expected:
        raise ProfileError(f"profile {profile.name}: its [memory] cannot be replaced: write it as a section of its own")
    return text
