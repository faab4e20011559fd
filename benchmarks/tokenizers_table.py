"""Which tokenizers and chat templates the runtime reads as transformers does: kinds × what was compared.

    python benchmarks/tokenizers_table.py

Small tokenizers of every published kind are made here, without network, and go through the check that a score begins
with. "alike" is the number of texts encoded, of texts decoded and of conversations rendered to the same ids; what was
refused says with which words.
"""

from __future__ import annotations

from collections.abc import Iterator

from common import make_parser
from small_tokenizers import KINDS, TEMPLATES, VOCABULARY
from transformers import LlamaConfig, PreTrainedTokenizerFast

from packager.errors import UnsupportedModelError
from packager.source.chat_template import ChatTemplate
from packager.source.tokenizer_check import check_runtime_tokenizer


def row(name: str, like: str, tokenizer: PreTrainedTokenizerFast, text: str | None) -> list[str]:
    template = None if text is None else ChatTemplate(text=text, origin="the table")
    try:
        made = check_runtime_tokenizer(tokenizer, template, LlamaConfig(vocab_size=VOCABULARY))
    except UnsupportedModelError as error:
        return [name, like, "refused", str(error).replace("|", "\\|").replace("\n", " ")[:160]]
    report, rules = made.report, [key for key in made.files.rules if key != "tokens"]
    alike = f"{report.encoded} encoded, {report.decoded} decoded"
    if template is not None:
        alike += f", {report.rendered} conversations"
    notes = [*report.rewritten, *(f"around the runtime: {key}" for key in rules), *report.known]
    return [name, like, alike, "; ".join(notes)]


def rows() -> Iterator[list[str]]:
    for name, kind in KINDS.items():
        yield row(name, kind.like, kind.make(), None)
    for name, template in TEMPLATES.items():
        yield row(f"template {name}", template.like, KINDS["gpt2"].make(), template.text)


def main() -> None:
    parser = make_parser(__doc__)
    parser.parse_args()
    print("| kind | like | alike | how |\n|---|---|---|---|")
    for cells in rows():
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
