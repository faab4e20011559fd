"""Acceptance test of a bundle, to be run on the device: python check.py [BUNDLE]

Needs onnxruntime-genai and numpy and nothing else. Verifies every file's hash, the tokenizer, the golden logits and
greedy tokens, then fills the whole context once and reports peak memory and speed. Prints one JSON document.
Exit status: 0 all checks passed, 3 some failed, 1 it could not run.

A copy of this file lies in every bundle as check.py, for devices that have no packager: it imports nothing of the
package, and spells the names of files, keys and tensors of a bundle for itself, as nothing else may.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

# Kernels with 8-bit activations differ from float arithmetic by about this much; a wrong weight differs by far more.
KL_LIMIT_NATS = 0.1
# A greedy token may differ from the reference's where that was undecided: by less than this share of the logits'
# spread.
GAP_LIMIT_SHARE = 0.5

# What the model's tokenizer does to a text and the runtime's does not; the file is there only where something is.
TEXT_FILE = "runtime_text.json"


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


def say(og: Any, model: Any, tokenizer: Any, rules: dict[str, Any], prompt: str, most: int, context_tokens: int) -> str:
    """What the bundle answers to `prompt`, greedily, in at most `most` tokens."""
    bare = False
    try:
        text = tokenizer.apply_chat_template(
            json.dumps([{"role": "user", "content": prompt}]), add_generation_prompt=True
        )
    except Exception:  # the model has no chat template: it continues the text as it is
        text, bare = prompt, True
    ids = encode(tokenizer, text, rules, bare)[-(context_tokens // 2) :]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=min(len(ids) + most, context_tokens), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return decode(tokenizer, generator.get_sequence(0)[len(ids) :], rules)


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
    manifest = json.loads((root / "packager.json").read_text(encoding="utf-8"))
    phase("hashes")
    checks = [check_hashes(root, manifest)]
    phase("import")
    import onnxruntime_genai as og

    phase("load")
    start = time.perf_counter()
    # A locale without UTF-8 reads other letters in a path as bytes, which the runtime would not take.
    model = og.Model(os.fsencode(root).decode("utf-8", "surrogateescape"))
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
    answer = say(og, model, tokenizer, rules, prompt, 48, bounds["context_tokens"])
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
    arguments = parser.parse_args()
    golden = arguments.golden or arguments.bundle / "golden.safetensors"
    report = run(arguments.bundle, arguments.prompt, golden, not arguments.no_report)
    if arguments.json:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        arguments.json.write_text(text, encoding="utf-8", newline="\n")
    # An output that cannot hold every letter gets them escaped.
    spelt = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(report, indent=2, ensure_ascii=not spelt))
    return 0 if report["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
