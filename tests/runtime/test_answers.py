"""What a conversation remembers, and when it starts to forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from packager.errors import RuntimeCheckError
from packager.runtime import answers
from packager.runtime.answers import Answer, Conversation, Sampling, Speaker


class Echo(Speaker):
    """Answers with two words; a token is a word."""

    def __init__(self, context_tokens: int) -> None:
        self.root, self.context_tokens = Path("echo"), context_tokens
        self.seen: list[list[str]] = []

    def encode(self, text: str, *, bare: bool) -> list[int]:
        self.seen.append(text.split())
        return list(range(len(text.split())))

    def _pieces(self, ids: list[int], max_length: int) -> Iterator[str | None]:
        yield from ("well", None, "", " then")


def joined(messages: Sequence[Mapping[str, str]]) -> str:
    return " ".join(f"{message['role']}: {message['content']}" for message in messages)


@pytest.fixture(autouse=True)
def templates(monkeypatch: pytest.MonkeyPatch) -> None:
    def many(request: Mapping[str, Any]) -> list[str]:
        return [joined(item["messages"]) for item in request["items"]]

    monkeypatch.setattr(answers, "render_chat", lambda folder, messages: joined(messages))
    monkeypatch.setattr(answers, "ask", many)


def test_an_answer_counts_tokens_and_drops_what_says_nothing() -> None:
    answer = Answer(iter(["well", None, "", " then"]), 7)
    assert list(answer) == ["well", " then"]
    assert (answer.text, answer.tokens, answer.prompt_tokens) == ("well then", 4, 7)
    assert answer.tokens_per_second > 0


def test_a_conversation_remembers_what_was_said() -> None:
    speaker = Echo(100)
    conversation = Conversation(speaker, system="be brief", most_tokens=8)
    list(conversation.say("one"))
    next(conversation.say("two"))  # broken off after its first piece
    conversation.say("three")
    assert " ".join(speaker.seen[-1]) == (
        "system: be brief user: one assistant: well then user: two assistant: well user: three"
    )
    assert conversation.forgotten == 0


def test_the_oldest_turns_are_forgotten_in_pairs_and_the_system_line_never() -> None:
    speaker = Echo(20)
    conversation = Conversation(speaker, system="be brief", most_tokens=8)
    counts = []
    for word in ("one", "two", "three", "four"):
        list(conversation.say(word))
        counts.append(conversation.forgotten)
    assert counts == [0, 0, 0, 1]
    assert " ".join(speaker.seen[-1]) == (
        "system: be brief user: two assistant: well then user: three assistant: well then user: four"
    )


def test_a_line_longer_than_the_context_is_refused_and_not_remembered() -> None:
    conversation = Conversation(Echo(20), system=None, most_tokens=8)
    list(conversation.say("one"))
    with pytest.raises(RuntimeCheckError, match=r"the prompt has 31 tokens, the bundle's context is 20"):
        conversation.say("word " * 30)
    assert len(list(conversation.say("two"))) == 2


def test_sampling_is_greedy_unless_it_is_warm() -> None:
    assert Sampling().options() == {"do_sample": False}
    warm = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4}
    assert Sampling(temperature=0.5, top_p=0.9, top_k=4).options() == warm
    assert Sampling(temperature=0.5, top_p=0.9, top_k=4, seed=0).options() == warm | {"random_seed": 0}
