"""Chat templates: found wherever a source keeps one, and rendered by the runtime as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Pico
from small_tokenizers import KINDS, TEMPLATES, VOCABULARY, byte_level
from transformers import AutoTokenizer, LlamaConfig

from packager.errors import UnsupportedModelError
from packager.runtime import tokenizer_probe
from packager.source.chat_template import ChatTemplate, find_template, plain_loop, spelled_out
from packager.source.checkpoint import open_checkpoint
from packager.source.tokenizer_check import RuntimeTokenizer, check_runtime_tokenizer
from packager.source.tokenizer_files import CONFIG_FILE, TEMPLATE_FILE

PLAIN = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
OTHER = "{% for message in messages %}({{ message['content'] }}){% endfor %}"


def checked(kind: str, text: str, **settings: bool) -> RuntimeTokenizer:
    template = ChatTemplate(text=text, origin="the test")
    return check_runtime_tokenizer(KINDS[kind].make(), template, LlamaConfig(vocab_size=VOCABULARY), **settings)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_rendered_alike_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_probe, "SECONDS", 10.0 if name == "endless" else 60.0)
    template = TEMPLATES[name]
    if template.refused is not None:
        with pytest.raises(UnsupportedModelError, match=template.refused):
            checked("gpt2", template.text)
        assert checked("gpt2", template.text, without_template=True).report.rendered == 0
        return
    made = checked("gpt2", template.text)
    assert made.report.rendered >= 6
    # What transformers and other loaders read stays the source's.
    assert made.files.texts[TEMPLATE_FILE] == template.text
    assert json.loads(made.files.texts[CONFIG_FILE])["chat_template"] == template.text


@pytest.mark.parametrize("kind", ["phi3", "metaspace-always", "llama2", "gemma3"])
def test_a_conversation_has_the_sources_ids(kind: str) -> None:
    assert checked(kind, TEMPLATES["llama2"].text).report.rendered == 12


def placed(where: str, folder: Path) -> None:
    byte_level().save_pretrained(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    named = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": PLAIN}]
    extra = folder / "additional_chat_templates"
    match where:
        case "file":
            (folder / TEMPLATE_FILE).write_text(PLAIN)
        case "file over config":
            (folder / TEMPLATE_FILE).write_text(PLAIN)
            config["chat_template"] = OTHER
        case "config":
            config["chat_template"] = PLAIN
        case "config list":
            config["chat_template"] = named
        case "processor":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
        case "processor list":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
        case "more files":
            extra.mkdir()
            (folder / TEMPLATE_FILE).write_text(PLAIN)
            (extra / "tool_use.jinja").write_text(OTHER)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


PLACES = ("file", "file over config", "config", "config list", "processor", "processor list", "more files")


@pytest.mark.parametrize("where", PLACES)
def test_every_place_and_form(where: str, tmp_path: Path) -> None:
    placed(where, tmp_path)
    found = find_template(AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    assert found is not None
    assert found.text == PLAIN
    assert found.left_out == (("tool_use",) if "list" in where or where == "more files" else ())


def test_no_template_and_templates_that_are_none(tmp_path: Path) -> None:
    placed("nowhere", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert find_template(tokenizer, tmp_path) is None
    tokenizer.chat_template = "  \n"
    assert find_template(tokenizer, tmp_path) is None
    tokenizer.chat_template = {"tool_use": OTHER}
    assert find_template(tokenizer, tmp_path) is None
    tokenizer.chat_template = {"default": 3}
    with pytest.raises(UnsupportedModelError, match="is of type int: expected a text"):
        find_template(tokenizer, tmp_path)
    tokenizer.chat_template = [{"template": OTHER}]
    with pytest.raises(UnsupportedModelError, match="entries with name and template"):
        find_template(tokenizer, tmp_path)


def test_a_folder_with_its_template_in_the_config_alone(pico_copy: Path, tmp_path: Path) -> None:
    path = pico_copy / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": PLAIN}))
    (pico_copy / TEMPLATE_FILE).unlink(missing_ok=True)
    checkpoint = open_checkpoint(str(pico_copy))
    config = checkpoint.config()
    checkpoint.save_side_files(tmp_path / "out", config, checkpoint.runtime_tokenizer(config, checkpoint.tokenizer()))
    assert (tmp_path / "out" / TEMPLATE_FILE).read_text() == PLAIN
    bare = checkpoint.runtime_tokenizer(config, checkpoint.tokenizer(), without_template=True)
    assert TEMPLATE_FILE not in bare.files.texts
    assert "chat_template" not in json.loads(bare.files.texts[CONFIG_FILE])


def test_a_refusal_names_the_model(pico: Pico, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(pico.folder))
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UnsupportedModelError, match=r"^.*: its chat template fails in transformers itself: never"):
        checkpoint.runtime_tokenizer(checkpoint.config(), tokenizer)


def test_white_space_is_spelled_out() -> None:
    template = "a\n  {% if x %}\nb {{- y }}\n  {#- note #}\n{%- endif %}\n  c\n"
    assert spelled_out(template) == "a\n{% if x %}b{{ y }}{% endif %}  c"
    assert spelled_out("{{ m.replace('a', \"b\") }}") == "{{ m.split('a') | join(\"b\") }}"
    assert spelled_out("{% raw %}{{ x }}{% endraw %}") == "{% raw %}{{ x }}{% endraw %}"


def test_a_loop_is_only_made_of_a_loop() -> None:
    def numbered(conversations: list[tuple[tuple[dict[str, str], ...], bool]]) -> list[str | None]:
        return [
            "".join(f"{at} {message['content']}" for at, message in enumerate(messages))
            for messages, _ in conversations
        ]

    assert plain_loop(numbered) is None  # type: ignore[arg-type]
    assert plain_loop(lambda conversations: ["nothing of it"] * len(conversations)) is None
    assert plain_loop(lambda conversations: [None] * len(conversations)) is None
