"""Acceptance test of a bundle, to be run on the device: python check.py [BUNDLE]

Needs onnxruntime-genai and numpy and nothing else. Verifies every file's hash, and that graph, settings and folder
hold nothing but a model; without these, nothing is loaded. Then the tokenizer, the golden logits and greedy tokens;
fills the whole context once and reports peak memory and speed. Prints one JSON document.
Exit status: 0 all checks passed, 3 some failed, 1 it could not run.

There is no signature: who rewrites all of a bundle with its sums can promise what they like, and replace this file.

A copy of this file lies in every bundle as check.py, for devices that have no packager: it imports nothing of the
package, and spells the names of files, keys and tensors of a bundle for itself, as nothing else may.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Kernels with 8-bit activations differ from float arithmetic by about this much; a wrong weight differs by far more.
KL_LIMIT_NATS = 0.1
# A greedy token may differ from the reference's where that was undecided: by less than this share of the logits'
# spread.
GAP_LIMIT_SHARE = 0.5

# What the model's tokenizer does to a text and the runtime's does not; the file is there only where something is.
TEXT_FILE = "runtime_text.json"

RENDER_SECONDS = 20
RENDER_BYTES = 8 << 30
"""Of address space, of which much is never used."""


def phase(name: str) -> None:
    """Say on stderr what begins, so that a killed run is known by the last phase it reached."""
    print(f"phase: {name}", file=sys.stderr, flush=True)


def memory() -> dict[str, int]:
    """Bytes of this process: peak, and resident now, anonymous and mapped apart. The peak alone where there is no
    /proc, and nothing where the system does not tell that either."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        peak = _peak_without_proc()
        return {} if peak is None else {"peak_bytes": peak}
    wanted = {"VmHWM": "peak_bytes", "RssAnon": "anonymous_bytes", "RssFile": "mapped_bytes"}
    return {
        wanted[key]: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in lines)
        if key in wanted
    }


def peak_bytes() -> int | None:
    """The most resident memory this process has had so far; None where the system does not tell."""
    return memory().get("peak_bytes")


def _peak_without_proc() -> int | None:
    """The peak as Windows tells psutil, where that is installed, or as getrusage tells it elsewhere."""
    try:
        import psutil

        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        if peak:
            return int(peak)
    except Exception:  # not installed, or it too needs what this system lacks
        pass
    if sys.platform == "win32":
        return None
    try:
        import resource
    except ImportError:
        return None
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # macOS counts bytes, the other systems kibibytes.
    return (most if sys.platform == "darwin" else most * 1024) or None


def sha256(path: Path) -> str:
    """Hex digest, read in small pieces: hashing must not set the peak."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 16):
            digest.update(piece)
    return digest.hexdigest()


def read_tensors(path: Path, only: str = "") -> dict[str, Any]:
    """Tensors of a safetensors file by name: all, or the one asked for."""
    import numpy as np

    kinds = {"F32": np.float32, "I32": np.int32, "U8": np.uint8}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__" or (only and name != only):
                continue
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            tensors[name] = np.frombuffer(file.read(end - begin), kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors


class RefusedError(Exception):
    """A bundle that is not what its sums list, or that asks its runtime for more than a model needs: nothing of it is
    loaded."""


NO_LOAD = "nothing of it was loaded"
# What may lie in a bundle beside what its sums list: the reports, one half-written, what Python and downloads leave.
UNSUMMED = re.compile(
    r"SHA256SUMS|\.gitattributes|report\.(json|html)|\.report\.(json|html)\.[\w.-]+|__pycache__/check\.[\w.-]+\.pyc"
    r"|\.gitattributes|\.cache/huggingface/.+"
)
SMALL_BYTES = 16 << 20  # of a JSON file, more than any that a bundle needs
GRAPH_BYTES = 256 << 20

Rule = tuple[Callable[[Any], bool], str]
"""What a value must be, as a question and in words."""


def whole(low: int, high: int) -> Rule:
    """A whole number."""
    return (lambda value: type(value) is int and low <= value <= high), f"a whole number from {low} to {high}"


def number(low: float, high: float) -> Rule:
    """Any number."""
    return (lambda value: type(value) in (int, float) and low <= value <= high), f"a number from {low} to {high}"


def spelled(pattern: str, meaning: str) -> Rule:
    """A text that `pattern` matches as a whole."""
    return (lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None), meaning


def many(rule: Rule) -> Rule:
    """A list of what `rule` allows."""
    return (lambda value: isinstance(value, list) and all(rule[0](item) for item in value)), f"a list, each {rule[1]}"


def either(one: Rule, other: Rule) -> Rule:
    """What one of two rules allows."""
    return (lambda value: one[0](value) or other[0](value)), f"{one[1]}, or {other[1]}"


FLAG: Rule = ((lambda value: type(value) is bool), "true or false")
ANY_TEXT: Rule = ((lambda value: isinstance(value, str)), "a text")
WORD = spelled(r"[A-Za-z0-9_]{1,64}", "a name of letters, digits and _")
COUNT = whole(1, 2**31 - 1)
TOKEN_ID = whole(-1, 2**31 - 1)
STOPS = either(TOKEN_ID, many(TOKEN_ID))
SWITCH = spelled("[01]", "'0' or '1'")
# The runtime prints a layer's number into such a name: another conversion than %d would read its stack.
PORT = spelled(r"[A-Za-z0-9_.]{1,80}", "the name of an input or output")
PORTS = spelled(r"[A-Za-z0-9_.]{0,40}%d[A-Za-z0-9_.]{0,40}", "names of inputs or outputs with one %d for the layer")
CACHES = ("key", "value", "key_scale", "value_scale", "conv", "recurrent")

GRAPH = "onnx/model_q4.onnx"
PROVIDER_OPTIONS: dict[str, dict[str, Rule]] = {
    "cpu": {},
    "cuda": {"enable_cuda_graph": SWITCH},
    "dml": {"enable_graph_capture": SWITCH},
    "webgpu": {"enableGraphCapture": SWITCH, "validationMode": spelled("disabled|basic", "disabled or basic")},
}
# Every setting that a bundle may have. Others of the runtime load libraries, write files or read them from elsewhere.
GENAI_RULES: dict[str, Any] = {
    "model": {
        "type": WORD,
        "vocab_size": COUNT,
        "context_length": COUNT,
        "bos_token_id": TOKEN_ID,
        "eos_token_id": STOPS,
        "pad_token_id": STOPS,
        **{f"{name}_token_id": TOKEN_ID for name in ("bot", "eot", "bor", "eor")},
        "decoder": {
            "filename": spelled(re.escape(GRAPH), GRAPH),
            **dict.fromkeys(("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers"), COUNT),
            "num_key_value_heads": COUNT,
            "inputs": {
                **dict.fromkeys(("input_ids", "attention_mask", "position_ids"), PORT),
                **{f"past_{name}_names": PORTS for name in CACHES},
            },
            "outputs": {"logits": PORT, **{f"present_{name}_names": PORTS for name in CACHES}},
            "sliding_window": {
                **dict.fromkeys(("window_size", "alignment", "cache_slack"), whole(0, 2**31 - 1)),
                "pad_value": TOKEN_ID,
                **dict.fromkeys(("slide_key_value_cache", "slide_inputs"), FLAG),
                "layers": many(whole(0, 9999)),
            },
            "layer_types": many(WORD),
            "conv_cache_size": whole(0, 9999),
            "session_options": {
                "log_id": spelled(r"[A-Za-z0-9_.-]{1,64}", "a name"),
                "provider_options": ((lambda value: not provider_faults(value)), "known options of one provider"),
                "intra_op_num_threads": whole(1, 1024),
                **dict.fromkeys(("enable_mem_pattern", "enable_cpu_mem_arena"), FLAG),
                "ep.cuda.fpa_intb_gemm": SWITCH,
                "optimization.disable_specified_optimizers": spelled("MatMulNBitsFusion", "MatMulNBitsFusion"),
                "session.use_device_allocator_for_initializers": SWITCH,
            },
        },
    },
    "search": {
        **dict.fromkeys(("max_length", "chunk_size", "num_return_sequences"), COUNT),
        "num_beams": whole(1, 256),
        **dict.fromkeys(("min_length", "no_repeat_ngram_size", "top_k"), whole(0, 2**31 - 1)),
        "random_seed": TOKEN_ID,
        **dict.fromkeys(("do_sample", "early_stopping", "past_present_share_buffer"), FLAG),
        **dict.fromkeys(("diversity_penalty", "length_penalty"), number(-1e6, 1e6)),
        "repetition_penalty": number(0, 1e6),
        "temperature": number(0, 1e6),
        "top_p": number(0, 1),
    },
}
MODULE_RULES: dict[str, Any] = {
    "tokenizer_class": spelled("GemmaTokenizer", "GemmaTokenizer"),
    "chat_template": ANY_TEXT,
}
TEXT_RULES: dict[str, Any] = {
    "normalize": spelled("NFK?[CD]", "a normal form of Unicode"),
    "absorb_space_before": many(ANY_TEXT),
    "leading_space": spelled("add|drop", "add or drop"),
    "tokens": many(ANY_TEXT),
    "around": many(many(whole(0, 2**31 - 1))),
    "strip_decoded_spaces": whole(-1, 2**31 - 1),
}
# Operators that reckon with tensors and do nothing else, by domain.
STANDARD_OPERATORS = """
Abs Add And Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum DequantizeLinear Div Einsum Equal Erf Exp
Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid Identity If IsInf
IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LpNormalization MatMul MatMulInteger Max Min Mod Mul Neg
NonZero Not OneHot Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape RMSNormalization RotaryEmbedding Round ScatterElements ScatterND Shape Sigmoid Sign
SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose
Trilu Unsqueeze Where Xor
"""
RUNTIME_OPERATORS = """
BiasGelu CausalConvWithState DequantizeLinear DynamicQuantizeMatMul FastGelu FusedConv FusedMatMul GatedAdd
GatedDeltaNet GatedRMSNorm GatherBlockQuantized Gelu GemmaRotaryEmbedding GroupQueryAttention LinearAttention
LinearAttentionGate MRotaryEmbedding MatMulBnb4 MatMulIntegerToFloat MatMulNBits MoE MultiHeadAttention QMoE
QuantizeLinear QuickGelu RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization SparseAttention
VarlenCausalConvWithState
"""
OPERATORS = {"": set(STANDARD_OPERATORS.split()), "com.microsoft": set(RUNTIME_OPERATORS.split())}
OPERATORS["ai.onnx"] = OPERATORS[""]


def strict_json(content: bytes) -> Any:
    """The value that JSON spells in one way only: no key twice, no NaN or infinity, no half of a character. ValueError
    for any other, RecursionError for one that is nested too deep."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def finite(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is no finite number")
        return value

    value = json.loads(content.decode(), object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; RefusedError says why it is none."""
    try:
        with path.open("rb") as file:
            content = file.read(SMALL_BYTES + 1)
        if len(content) > SMALL_BYTES:
            raise ValueError(f"more than {SMALL_BYTES} bytes")
        value = strict_json(content)
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedError(f"{path} is not readable JSON ({str(error)[:200]}): {NO_LOAD}") from None
    if not isinstance(value, dict):
        raise RefusedError(f"{path}: expected a JSON object, found {type(value).__name__}: {NO_LOAD}")
    return value


def shown(value: object) -> str:
    """A value in an error, cut short."""
    said = ascii(value) if not isinstance(value, dict | list) else f"{type(value).__name__} of {len(value)}"
    return said if len(said) <= 80 else said[:80] + "…"


def refuse_unlisted(found: Any, rules: dict[str, Any], where: str) -> None:
    """RefusedError for a setting that `rules` do not name, or whose value they do not allow."""
    if not isinstance(found, dict):
        raise RefusedError(f"{where} is {shown(found)}: expected an object: {NO_LOAD}")
    for key, value in found.items():
        rule = rules.get(key)
        if rule is None:
            raise RefusedError(f"{where}: {shown(key)} is no setting that a bundle may have: {NO_LOAD}")
        if isinstance(rule, dict):
            refuse_unlisted(value, rule, f"{where}: {key}")
        elif not rule[0](value):
            raise RefusedError(f"{where}: {key} is {shown(value)}: expected {rule[1]}: {NO_LOAD}")


def provider_faults(value: Any) -> bool:
    """Whether `provider_options` ask for more than options that are known, of at most one provider."""
    if not isinstance(value, list) or len(value) > 1 or not all(isinstance(item, dict) for item in value):
        return True
    for name, options in (pair for item in value for pair in item.items()):
        try:
            refuse_unlisted(options, PROVIDER_OPTIONS[name.lower()], name)
        except (RefusedError, KeyError):
            return True
    return False


def refuse_settings(root: Path, context_tokens: int, provider: str) -> None:
    """RefusedError for a setting of the runtime, the tokenizer or the model that is not on the list of those that a
    bundle may have."""
    where = root / "genai_config.json"
    config = read_object(where)
    refuse_unlisted(config, GENAI_RULES, str(where))
    model, search = config.get("model", {}), config.get("search", {})
    if missing := {"type", "vocab_size", "decoder", "context_length"} - set(model):
        raise RefusedError(f"{where}: model has no {min(missing)!r}: {NO_LOAD}")
    if "filename" not in model["decoder"]:
        raise RefusedError(f"{where}: model: decoder has no 'filename': {NO_LOAD}")
    for name, found in (("max_length", search.get("max_length")), ("context_length", model["context_length"])):
        if found != context_tokens:
            raise RefusedError(
                f"{where}: {name} is {shown(found)}: expected the manifest's context of {context_tokens} tokens: "
                f"{NO_LOAD}"
            )
    asked = model["decoder"].get("session_options", {}).get("provider_options", [])
    if others := {name for options in asked for name in options if name.lower() != provider}:
        raise RefusedError(f"{where} asks for provider {shown(min(others))}: expected {shown(provider)}: {NO_LOAD}")
    for name, rules in (("tokenizer_module.json", MODULE_RULES), (TEXT_FILE, TEXT_RULES)):
        if (path := root / name).exists():
            refuse_unlisted(read_object(path), rules, str(path))
    refuse_fetching(root)


def refuse_fetching(root: Path) -> None:
    """RefusedError where one of the configurations in folder `root` that transformers reads names code or weights."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (path := root / name).exists():
            refuse_code(read_object(path), str(path))


def refuse_code(config: Any, where: str, depth: int = 0) -> None:
    """RefusedError where a configuration of transformers names code or weights that it would fetch."""
    if depth > MOST_NESTING:
        raise RefusedError(f"{where[:200]}…: nested more than {MOST_NESTING} deep: {NO_LOAD}")
    for key, value in config.items():
        fetched = key.endswith(("attn_implementation", "experts_implementation")) and not WORD[0](value or "none")
        if fetched or key in ("transformers_weights", "use_kernels"):
            raise RefusedError(
                f"{where}: {key} is {shown(value)}, which names code or weights from elsewhere: {NO_LOAD}"
            )
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                refuse_code(inner, f"{where}: {key[:80]}", depth + 1)


def read_manifest(root: Path) -> dict[str, Any]:
    """packager.json; RefusedError where what is read of it here is not as it should be."""
    where = root / "packager.json"
    manifest = read_object(where)
    files, bounds = manifest.get("files"), manifest.get("bounds")
    entry: dict[str, Any] = {"path": ANY_TEXT, "role": ANY_TEXT, "bytes": whole(0, 2**53), "sha256": ANY_TEXT}
    if not isinstance(files, list) or not isinstance(bounds, dict):
        raise RefusedError(f"{where} has no files or no bounds: it is damaged: {NO_LOAD}")
    for position, item in enumerate(files):
        refuse_unlisted(item, entry, f"{where}: files[{position}]")
        parts = item.get("path", "").split("/")
        if set(item) != set(entry) or {"", ".", ".."} & set(parts) or re.search(r"[\\:\0]", item["path"]):
            raise RefusedError(f"{where}: files[{position}] names no file of this folder: {NO_LOAD}")
    for name in ("budget_bytes", "context_tokens", "prompt_tokens"):
        if not whole(1, 2**53)[0](bounds.get(name)):
            raise RefusedError(f"{where}: bounds: {name} is {shown(bounds.get(name))}: expected a positive number")
    return manifest


def refuse_unsummed(root: Path, manifest: dict[str, Any]) -> None:
    """RefusedError unless SHA256SUMS lists the manifest and exactly its files, and nothing else lies in the folder."""
    where, found = root / "SHA256SUMS", dict[str, str]()
    try:
        lines = where.read_bytes()[: SMALL_BYTES + 1].decode().splitlines()
    except (OSError, ValueError) as error:
        raise RefusedError(
            f"{where} cannot be read ({str(error)[:200]}): the bundle is incomplete: {NO_LOAD}"
        ) from None
    for line in lines:
        digest, gap, name = line[:64], line[64:66], line[66:]
        if re.fullmatch("[0-9a-f]{64}", digest) is None or gap not in ("  ", " *") or name in found:
            raise RefusedError(f"{where}: {shown(line)} is no line of sha256sum's, or names a file again: {NO_LOAD}")
        found[name] = digest
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    expected["packager.json"] = sha256(root / "packager.json")
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise RefusedError(
            f"{where} and packager.json do not agree on {shown(wrong[0])}: one of them was altered: {NO_LOAD}"
        )
    extra = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if not path.is_file() or (name not in expected and UNSUMMED.fullmatch(name) is None):
            extra.append(name)
    if extra:
        names = ", ".join(map(shown, extra[:5])) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise RefusedError(f"{root} holds what its manifest does not list: {names}: take it away; {NO_LOAD}")


# How the messages of onnx.proto nest, as far as a graph can hold code or name files: message → field → message.
NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "operator", 5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {1: "key", 2: "value"},
}
MOST_NESTING = 32


def fields(data: memoryview, what: str) -> Iterator[tuple[int, Any]]:
    """Field numbers of a protobuf message with the values of those that NESTED names: bytes, or None for others.
    ValueError where it is cut short."""
    place, end = 0, len(data)

    def varint() -> int:
        nonlocal place
        result = 0
        for shift in range(0, 70, 7):
            if place >= end:
                break
            byte = data[place]
            place += 1
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise ValueError("a number is cut short")

    wanted = NESTED[what]
    while place < end:
        tag = varint()
        field, wire = tag >> 3, tag & 7
        start = place
        if wire == 0:
            varint()
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        elif wire == 2:
            length = varint()
            start, place = place, place + length
        else:
            raise ValueError(f"a field of kind {wire}")
        if place > end:
            raise ValueError("a field is cut short")
        if field in wanted:
            if wire != 2:
                raise ValueError("a field is not of its kind")
            yield field, data[start:place]


def refuse_graph(where: Path) -> None:
    """RefusedError for a graph with operators that are not on the list, functions, or data outside the file beside it.

    Reads the file's own nesting: every field counts, where a parser might take the last of several.
    """
    try:
        content = where.read_bytes()
        if not 0 < len(content) <= GRAPH_BYTES:
            raise ValueError(f"{len(content)} bytes")
        refuse_message(memoryview(content), "model", 0, where)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{where} is no ONNX graph ({str(error)[:200]}): {NO_LOAD}") from None


def refuse_message(data: memoryview, what: str, depth: int, where: Path) -> None:
    """As `refuse_graph`, of one message within."""
    if depth > MOST_NESTING:
        raise ValueError(f"nested more than {MOST_NESTING} deep")
    texts: dict[str, list[str]] = {}
    for field, value in fields(data, what):
        inner = NESTED[what][field]
        if inner in ("function", "training"):
            raise RefusedError(f"{where} holds a {inner} of its own, which no bundle has: {NO_LOAD}")
        if inner in NESTED:
            refuse_message(value, inner, depth + 1, where)
        elif inner != "opset":
            texts.setdefault(inner, []).append(bytes(value).decode())
    if what == "node":
        for domain in texts.get("domain", [""]):
            for operator in texts.get("operator", ["(none)"]):
                if operator not in OPERATORS.get(domain, ()):
                    name = shown(f"{domain or 'ai.onnx'}.{operator}")
                    raise RefusedError(f"{where} holds the operator {name}, which no bundle has: {NO_LOAD}")
    if what == "tensor":
        refuse_external(data, where)


def refuse_external(data: memoryview, where: Path) -> None:
    """RefusedError for a tensor whose data does not lie, whole, in the file beside the graph."""
    found: dict[str, str] = {}
    for _, entry in fields(data, "tensor"):
        parts = [(field, bytes(value).decode()) for field, value in fields(entry, "external")]
        names = [value for field, value in parts if field == 1]
        if len(names) != 1 or len(parts) > 2 or names[0] in found:
            raise ValueError("a place of data is said twice")
        found[names[0]] = next((value for field, value in parts if field == 2), "")
    if not found:
        return
    beside = where.with_name(where.name + "_data")
    if found.get("location") != beside.name:
        raise RefusedError(
            f"{where} takes data from {shown(found.get('location'))}: expected {beside.name}, beside it: {NO_LOAD}"
        )
    numbers = {key: value for key, value in found.items() if key in ("offset", "length")}
    if any(re.fullmatch("[0-9]{1,18}", value) is None for value in numbers.values()) or (
        sum(map(int, numbers.values())) > beside.stat().st_size
    ):
        raise RefusedError(f"{where} takes data from beyond the end of {beside.name}: {NO_LOAD}")


def refuse_untrusted(root: Path, manifest: dict[str, Any]) -> None:
    """RefusedError, with the reason, for a bundle that is not what its sums list or asks for more than a model needs.

    `manifest` is packager.json, whose files were found to have their hashes. Nothing is loaded or run to tell.
    """
    refuse_unsummed(root, manifest)
    refuse_settings(root, manifest["bounds"]["context_tokens"], str(manifest["bounds"].get("provider")))
    refuse_graph(root / GRAPH)


def row(name: str, value: object, limit: object, unit: str, passed: bool) -> dict[str, Any]:
    """One check: what was measured, what was allowed, and the verdict."""
    return {"name": name, "value": value, "limit": limit, "unit": unit, "passed": bool(passed)}


def check_hashes(root: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Every file in the manifest has its size and hash."""
    wrong = []
    for entry in manifest["files"]:
        path = root / entry["path"]
        if not path.is_file() or path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            wrong.append(entry["path"])
    return row(
        "files whose size or SHA-256 is not the manifest's", len(wrong), 0, ", ".join(wrong[:3]) or "files", not wrong
    )


def kl_divergence(expected: Any, found: Any) -> float:
    """KL(softmax(expected) ‖ softmax(found)) in nats."""
    import numpy as np

    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64) - x.max()
        return x - np.log(np.exp(x).sum())

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum())


def text_rules(root: Path = Path()) -> dict[str, Any]:
    """What to do to a text around the runtime's tokenizer, from TEXT_FILE; {} where the bundle has none."""
    path = root / TEXT_FILE
    rules: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return rules


def encode(tokenizer: Any, text: str, rules: dict[str, Any], bare: bool = True) -> list[int]:
    """Token ids of `text` as the model's own tokenizer makes them.

    A bare text gets the model's special tokens (its begin of text, say); a rendered chat has them already: bare=False.
    """
    if form := rules.get("normalize"):
        text = unicodedata.normalize(form, text)
    for token in rules.get("absorb_space_before", []):
        text = re.sub(r"\s+(?=" + re.escape(token) + ")", "", text)
    leading, tokens = rules.get("leading_space"), rules.get("tokens", [])
    if leading == "add" and text and not text.startswith((" ", *tokens)):
        text = " " + text
    if leading == "drop":
        # The runtime puts a space before every piece between these tokens; the source not where one stands already.
        cut = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "$^"
        text = "".join(
            piece[1:] if piece.startswith(" ") and piece not in tokens else piece
            for piece in re.split(f"({cut})", text)
        )
    around = rules.get("around")
    tokenizer.update_options(add_special_tokens="true" if bare and around is None else "false")
    ids = [int(number) for number in tokenizer.encode(text)] if text or around is None else []
    return [*around[0], *ids, *around[1]] if bare and around is not None else ids


def decode(tokenizer: Any, ids: Any, rules: dict[str, Any]) -> str:
    """The text of `ids` as the model's own tokenizer decodes them."""
    return strip(str(tokenizer.decode(ids)), rules)


def strip(text: str, rules: dict[str, Any]) -> str:
    """The beginning of a decoded text without the spaces that the model's own tokenizer takes off it; -1 is all."""
    most = int(rules.get("strip_decoded_spaces", 0))
    spaces = len(text) - len(text.lstrip(" "))
    return text[spaces if most < 0 else min(spaces, most) :]


def divergence_row(name: str, divergences: list[float], unit: str) -> dict[str, Any]:
    """The worst of some divergences against the limit; what is no number is over it."""
    passed = all(divergence <= KL_LIMIT_NATS for divergence in divergences)
    finite = all(abs(divergence) < float("inf") for divergence in divergences)
    worst = round(max(divergences, default=0.0), 6) if finite else "not a number"
    return row(name, worst, KL_LIMIT_NATS, unit, passed)


def check_tokenizer(tokenizer: Any, golden: dict[str, Any], rules: dict[str, Any]) -> list[dict[str, Any]]:
    """Encode and decode real text as the source tokenizer does."""
    import numpy as np

    count, wrong_ids, wrong_text = 0, 0, 0
    while f"text.{count}.bytes" in golden:
        text = golden[f"text.{count}.bytes"].tobytes().decode()
        expected = golden[f"text.{count}.ids"]
        found = np.asarray(encode(tokenizer, text, rules), dtype=np.int32)
        wrong_ids += not (len(found) == len(expected) and bool((found == expected).all()))
        # Without the special tokens, as an answer is; files of an earlier version hold no such ids.
        plain = golden.get(f"text.{count}.plain", expected)
        wrong_text += decode(tokenizer, plain, rules) != golden[f"text.{count}.decoded"].tobytes().decode()
        count += 1
    return [
        row(
            "texts that the tokenizer encodes differently from the source model's",
            wrong_ids,
            0,
            f"of {count} texts",
            wrong_ids == 0,
        ),
        row(
            "texts that the tokenizer decodes differently from the source model's",
            wrong_text,
            0,
            f"of {count} texts",
            wrong_text == 0,
        ),
    ]


def check_golden(og: Any, model: Any, golden: dict[str, Any]) -> list[dict[str, Any]]:
    """Last logits and greedy tokens of the golden prompts against the reference's."""
    import numpy as np

    divergences: list[float] = []
    undecided, wrong, total, count = 0, 0, 0, 0
    while f"prompt.{count}.ids" in golden:
        ids, logits, greedy, gaps = (golden[f"prompt.{count}.{part}"] for part in ("ids", "logits", "greedy", "gaps"))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + len(greedy), do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        found = np.asarray(generator.get_logits()).reshape(-1)[-len(logits) :]
        divergences.append(kl_divergence(logits, found))
        spread = float(logits.std())
        for step, expected in enumerate(greedy):
            if generator.is_done():
                break
            generator.generate_next_token()
            total += 1
            if generator.get_sequence(0)[-1] != expected:
                # After the first different token the texts differ: what follows has no reference.
                undecided += float(gaps[step]) <= GAP_LIMIT_SHARE * spread
                wrong += float(gaps[step]) > GAP_LIMIT_SHARE * spread
                break
        del generator
        count += 1
    return [
        divergence_row("KL divergence of the next-token distribution from PyTorch, worst prompt", divergences, "nats"),
        row(
            "prompts whose greedy tokens differ from PyTorch other than at a near tie",
            wrong,
            0,
            f"of {count} prompts ({undecided} differ at a near tie; {total} tokens compared)",
            wrong == 0,
        ),
    ]


def check_contexts(og: Any, model: Any, golden: dict[str, Any], filled: Any) -> list[dict[str, Any]]:
    """Last logits of long prompts, in the bundle's own pieces, against the reference's.

    They are prompts of the same text. `filled` holds the tokens of the longest that the bundle takes and the logits
    after it, which are known from filling the context.
    """
    import numpy as np

    if "context.0.ids" not in golden:
        return []  # made by a version that did not ask, or where no reference was
    divergences, lengths, count = [], [], 0
    while f"context.{count}.ids" in golden:
        ids, logits, past = (golden[f"context.{count}.{part}"] for part in ("ids", "logits", "past"))
        if np.array_equal(ids, filled[0]):
            found = filled[1]
        else:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=len(ids) + 1, do_sample=False)
            generator = og.Generator(model, params)
            generator.append_tokens(ids)
            found = np.asarray(generator.get_logits()).reshape(-1)
            del generator
        divergences.append(kl_divergence(logits, found[-len(logits) :]))
        lengths.append(f"{len(ids)} tokens" + (f" (past {int(past[0])})" if int(past[0]) else ""))
        count += 1
    unit = f"nats, the worst after {', '.join(lengths)}"
    if len(golden["context.0.ids"]) < len(filled[0]):
        unit += f"; not compared up to the longest prompt, of {len(filled[0])}"
    if "context.left_out" in golden:
        unit += f"; not compared past {', '.join(str(length) for length in golden['context.left_out'])}"
    return [divergence_row("divergence at the end of a full context", divergences, unit)]


def check_stops(og: Any, model: Any, golden: dict[str, Any]) -> list[dict[str, Any]]:
    """A generation ends at each token where the source model's does: the token is made certain, then chosen."""
    import numpy as np

    if "stops" not in golden:
        return []  # made by a version that did not ask
    missed = []
    for stop in golden["stops"]:
        params = og.GeneratorParams(model)
        prompt = golden["prompt.0.ids"]
        params.set_search_options(max_length=len(prompt) + 4, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        logits = np.asarray(generator.get_logits())
        certain = np.zeros_like(logits)
        certain[..., int(stop)] = 100.0
        generator.set_logits(certain)
        generator.generate_next_token()
        if not generator.is_done():
            missed.append(int(stop))
        del generator
    names = ", ".join(map(str, missed[:3])) or f"of {len(golden['stops'])} tokens"
    return [row("stop tokens that do not stop", len(missed), 0, names, not missed)]


def fill_context(og: Any, model: Any, text: Any, prompt_tokens: int, context_tokens: int) -> tuple[dict[str, Any], Any]:
    """The longest prompt, of `text`'s tokens, and the fullest context: tokens per second of both phases, and the
    prompt's tokens with the logits after it."""
    import numpy as np

    phase("prefill")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=context_tokens, min_length=context_tokens, do_sample=False)
    generator = og.Generator(model, params)
    ids = np.resize(text.reshape(-1), prompt_tokens).astype(np.int32)
    start = time.perf_counter()
    generator.append_tokens(ids)
    # The buffer is the generator's own: the next run writes over it.
    logits = np.array(generator.get_logits(), np.float32).reshape(-1)
    prefill = time.perf_counter() - start
    phase("decode")
    steps, start = 0, time.perf_counter()
    while not generator.is_done() and prompt_tokens + steps < context_tokens:
        generator.generate_next_token()
        steps += 1
    decode = time.perf_counter() - start
    speed = {
        "prefill_tokens_per_second": round(prompt_tokens / prefill, 2),
        "decode_tokens_per_second": round(steps / max(decode, 1e-9), 2),
        "context_tokens": prompt_tokens + steps,
    }
    return speed, (ids, logits)


def runtime_path(root: Path) -> str:
    """`root` as the runtime takes it: a locale without UTF-8 reads other letters in a path as bytes."""
    return os.fsencode(root).decode("utf-8", "surrogateescape")


def rendered_chat(root: Path, prompt: str) -> tuple[str | None, str]:
    """What the bundle's chat template makes of `prompt`, and why it makes nothing of it.

    Templates are programs. It is rendered in a process of its own, which ends when the template does not.
    """
    flags = ["-P"] if getattr(sys.flags, "safe_path", False) else []
    command = [sys.executable, *flags, str(Path(__file__).resolve()), str(root), "--render", "--prompt", prompt]
    try:
        done = subprocess.run(command, capture_output=True, timeout=RENDER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"took longer than {RENDER_SECONDS} s and was stopped"
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return None, (lines or ["no reason given"])[-1][:200]
    return done.stdout.decode(), ""


def render(root: Path, prompt: str) -> None:
    """Write the rendered template to stdout: what the child of `rendered_chat` does."""
    if sys.platform != "win32":
        # Whoever waits for this process may be gone before its time is up.
        signal.alarm(RENDER_SECONDS)
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (RENDER_BYTES, RENDER_BYTES))
        except (ImportError, OSError, ValueError):  # this system has no such limit
            pass
    import onnxruntime_genai as og

    turn = json.dumps([{"role": "user", "content": prompt}])
    made = og.Tokenizer(runtime_path(root)).apply_chat_template(turn, add_generation_prompt=True)
    sys.stdout.buffer.write(made.encode())


def say(og: Any, model: Any, ids: list[int], most: int, context_tokens: int) -> list[int]:
    """The token ids that the bundle answers to a prompt's, greedily, at most `most`."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=min(len(ids) + most, context_tokens), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def check_report(root: Path, bundle: str) -> dict[str, Any]:
    """What the report beside the bundle of that hash says of it: told, not judged."""
    try:
        report = json.loads((root / "report.json").read_text(encoding="utf-8"))
        failed = [check["name"] for check in report["checks"] if check["passed"] is False]
        of_this, passed = report["bundle_sha256"] == bundle, report["passed"] is True
    except FileNotFoundError:
        said = "never validated: it has no report"
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        said = "not known: its report cannot be read"
    else:
        said = "valid" if passed and not failed else f"NOT VALID: {', '.join(map(str, failed[:3]))}"
        said = said if of_this else "not known: its report is of another bundle"
    return row("what this bundle's own report says", said, None, "", True) | {"passed": None}


def run(root: Path, prompt: str, golden_path: Path, with_report: bool = True) -> dict[str, Any]:
    """All checks of the bundle in `root`; the golden ones where `golden_path` exists."""
    phase("hashes")
    manifest = read_manifest(root)
    checks = [check_hashes(root, manifest)]
    if not checks[0]["passed"]:
        return {"passed": False, "checks": checks, "memory": {}, "speed": {}, "prompt": prompt, "answer": ""}
    refuse_untrusted(root, manifest)
    # Before anything is loaded: two processes are never here at their largest.
    phase("template")
    chat, reason = rendered_chat(root, prompt)
    if reason and (root / "chat_template.jinja").is_file():
        checks.append(row("what keeps the chat template from rendering", reason, None, "", False))
    phase("import")
    import onnxruntime_genai as og

    phase("load")
    start = time.perf_counter()
    model = og.Model(runtime_path(root))
    tokenizer = og.Tokenizer(model)
    load = time.perf_counter() - start
    bounds, rules = manifest["bounds"], text_rules(root)
    text = read_tensors(root / "reference.safetensors", only="heldout")["heldout"]
    speed, filled = fill_context(og, model, text, bounds["prompt_tokens"], bounds["context_tokens"])
    used = memory()
    # Memory is read before the golden file comes in: that is the test's, not the model's.
    phase("golden")
    golden = read_tensors(golden_path) if golden_path.is_file() else {}
    if golden:
        checks += check_tokenizer(tokenizer, golden, rules) + check_golden(og, model, golden)
        checks += check_contexts(og, model, golden, filled)
        checks += check_stops(og, model, golden)
    if used:
        budget = bounds["budget_bytes"]
        checks.append(
            row(
                "peak resident memory of the process", used["peak_bytes"], budget, "bytes", used["peak_bytes"] <= budget
            )
        )
    if with_report:
        checks.append(check_report(root, manifest["bundle_sha256"]))
    phase("answer")
    asked = encode(tokenizer, prompt if chat is None else chat, rules, bare=chat is None)
    asked = asked[-(bounds["context_tokens"] // 2) :]
    answer = decode(tokenizer, say(og, model, asked, 48, bounds["context_tokens"]), rules)
    return {
        "passed": all(check["passed"] is not False for check in checks),
        "checks": checks,
        "memory": used,
        "speed": speed | {"load_seconds": round(load, 3)},
        "prompt": prompt,
        "answer": answer,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundle",
        nargs="?",
        type=Path,
        default=Path(__file__).absolute().parent,  # in a hub's cache this file is a link to where no bundle is
        help="the bundle's folder; this file's own by default",
    )
    parser.add_argument("--json", type=Path, help="write the document to this file as well")
    parser.add_argument("--golden", type=Path, help="golden file; golden.safetensors in the bundle by default")
    parser.add_argument(
        "--prompt", default="Name three things a small computer is good for.", help="what to ask the model at the end"
    )
    parser.add_argument("--no-report", action="store_true", help="leave out what report.json says: it is being made")
    parser.add_argument("--render", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.render:
        render(arguments.bundle, arguments.prompt)
        return 0
    golden = arguments.golden or arguments.bundle / "golden.safetensors"
    try:
        report = run(arguments.bundle, arguments.prompt, golden, not arguments.no_report)
    except RefusedError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        arguments.json.write_text(text, encoding="utf-8", newline="\n")
    # An output that cannot hold every letter gets them escaped.
    spelt = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(report, indent=2, ensure_ascii=not spelt))
    return 0 if report["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
