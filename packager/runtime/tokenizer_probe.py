"""A tokenizer and a chat template in a child process with little time and memory: python -m … REQUEST

Templates are programs: one that loops for ever, or grows its text for ever, must end the child and not us. The request
is a JSON file; its `task` is `tokenize` or `chat` (the runtime's tokenizer in `folder`) or `jinja` (transformers' own
rendering of `template`). The answer, one JSON list on stdout, holds for each item what was made of it, or
{"error": text}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packager.errors import RuntimeCheckError
from packager.io.leftovers import scratch_folder
from packager.runtime.device_check import decode, encode
from packager.runtime.limits import LimitedRun, run_limited

SECONDS = 30.0
LIMIT_BYTES = 1 << 30
_ADDRESS_BYTES = 8 << 30

Message = Mapping[str, str]


def ask(request: Mapping[str, Any]) -> list[Any]:
    """The child's answers to `request`. RuntimeCheckError when it crashed, grew beyond LIMIT_BYTES or took longer than
    SECONDS."""
    with scratch_folder() as scratch:
        path = scratch / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        done = run_limited(
            [sys.executable, "-m", "packager.runtime.tokenizer_probe", str(path)], LIMIT_BYTES, timeout_seconds=SECONDS
        )
    if done.returncode != 0:
        raise RuntimeCheckError(_ending(done))
    answers: list[Any] = json.loads(done.stdout)
    return answers


def render_chat(folder: Path, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """What the runtime renders `messages` to with the template in `folder`, in a child that is stopped when the
    template does not end. RuntimeCheckError says what went wrong."""
    request = {
        "task": "chat",
        "folder": str(folder),
        "items": [{"messages": list(messages), "add_generation_prompt": add_generation_prompt}],
    }
    answer = ask(request)[0]
    if isinstance(answer, str):
        return answer
    raise RuntimeCheckError(f"{folder}: the runtime cannot render the chat template: {first_line(answer['error'])}")


def first_line(text: str) -> str:
    """The first line of an error of the runtime's: what follows quotes the template."""
    return (text.strip().splitlines() or ["no reason given"])[0][:200]


def _ending(done: LimitedRun) -> str:
    if done.timed_out:
        return f"took longer than {SECONDS:.0f} s and was stopped"
    if done.killed_at_limit or "MemoryError" in done.stderr or "bad_alloc" in done.stderr:
        return f"needed more than {LIMIT_BYTES >> 20} MiB of memory and was stopped"
    return f"failed: {done.tail}" if done.returncode == 1 and done.tail else done.ending


def _tokenize(request: Mapping[str, Any]) -> list[Any]:
    import onnxruntime_genai as og

    tokenizer = og.Tokenizer(request["folder"])
    rules = request["rules"]

    def one(item: Mapping[str, Any]) -> Any:
        if "ids" in item:
            return decode(tokenizer, item["ids"], rules)
        return [int(number) for number in encode(tokenizer, item["text"], rules, bare=item["bare"])]

    return [_tried(one, item) for item in request["items"]]


def _chat(request: Mapping[str, Any]) -> list[Any]:
    import onnxruntime_genai as og

    tokenizer = og.Tokenizer(request["folder"])

    def one(item: Mapping[str, Any]) -> Any:
        return tokenizer.apply_chat_template(
            json.dumps(item["messages"]), add_generation_prompt=item["add_generation_prompt"]
        )

    return [_tried(one, item) for item in request["items"]]


def _jinja(request: Mapping[str, Any]) -> list[Any]:
    # The loader of transformers itself: its extensions, its sandbox and its whitespace are what "renders" means.
    from transformers.utils.chat_template_utils import render_jinja_template

    def one(item: Mapping[str, Any]) -> Any:
        rendered, _ = render_jinja_template(
            conversations=[item["messages"]],
            chat_template=request["template"],
            add_generation_prompt=item["add_generation_prompt"],
            **request["variables"],
        )
        return rendered[0]

    return [_tried(one, item) for item in request["items"]]


def _tried(make: Callable[[Mapping[str, Any]], Any], item: Mapping[str, Any]) -> Any:
    try:
        return make(item)
    except MemoryError:
        raise
    except Exception as error:  # the runtime and jinja raise whatever they like; the parent judges it
        return {"error": str(error) or type(error).__name__}


def main(path: str) -> int:
    """Answer the request in the file `path`."""
    if sys.platform != "win32":
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            # Where no control group can be had this still bounds a template that grows for ever.
            resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    tasks = {"tokenize": _tokenize, "chat": _chat, "jinja": _jinja}
    answers = tasks[request["task"]](request)
    sys.stdout.write(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
