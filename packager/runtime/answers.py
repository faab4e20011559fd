"""What a bundle says: pieces of text as they come, one prompt at a time or in a conversation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import RuntimeCheckError
from packager.runtime.device_check import encode, strip, text_rules
from packager.runtime.tokenizer_probe import Message, ask, first_line, render_chat


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest where `temperature` is 0, else by chance, among the `top_k` likeliest
    (0: all) that together have probability `top_p`. `seed` None is another one each time."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Search options of the runtime."""
        if not self.temperature:
            return {"do_sample": False}
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return chosen if self.seed is None else chosen | {"random_seed": self.seed}


class Answer(Iterator[str]):
    """Pieces of text as the model makes them. `tokens` counts those made so far, `prompt_tokens` those it was given;
    `seconds` is the time that the runtime took for both."""

    def __init__(self, pieces: Iterator[str | None], prompt_tokens: int) -> None:
        self._pieces = pieces
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.seconds = 0.0
        self.text = ""

    def __next__(self) -> str:
        while True:
            began = time.perf_counter()
            piece = next(self._pieces)
            self.seconds += time.perf_counter() - began
            self.tokens += 1
            if piece:
                self.text += piece
                return piece

    @property
    def tokens_per_second(self) -> float:
        """Speed of the answer, reading the prompt included; 0 before its first token."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Speaker:
    """The model in folder `root`, loaded: at most `context_tokens` of a prompt and its answer together."""

    def __init__(self, root: Path, *, context_tokens: int, sampling: Sampling) -> None:
        import onnxruntime_genai as og

        self.root, self.context_tokens, self._options = root, context_tokens, sampling.options()
        try:
            self._model = og.Model(str(root))
            self._tokenizer = og.Tokenizer(self._model)
        except RuntimeError as error:
            raise _failed(root, error) from error
        self._rules = text_rules(root)

    def encode(self, text: str, *, bare: bool) -> list[int]:
        """Token ids of a bare text, which gets the model's special tokens, or of a rendered chat, which has them."""
        try:
            return encode(self._tokenizer, text, self._rules, bare=bare)
        except RuntimeError as error:
            raise _failed(self.root, error) from error

    def answer(self, ids: list[int], most_tokens: int) -> Answer:
        """What follows `ids`: at most `most_tokens`, and no more than the context holds. RuntimeCheckError where it
        holds none."""
        if len(ids) >= self.context_tokens:
            raise RuntimeCheckError(
                f"the prompt has {len(ids)} tokens, the bundle's context is {self.context_tokens}: shorten the prompt "
                "or pack with a longer --context"
            )
        return Answer(self._pieces(ids, min(self.context_tokens, len(ids) + most_tokens)), len(ids))

    def _pieces(self, ids: list[int], max_length: int) -> Iterator[str | None]:
        """One item a token: text that is whole, "" inside a character, None before a text that is only spaces ends."""
        import onnxruntime_genai as og

        try:
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=max_length, **self._options)
            generator = og.Generator(self._model, params)
            generator.append_tokens(ids)
            stream = self._tokenizer.create_stream()
            kept: str | None = ""
            while not generator.is_done():
                generator.generate_next_token()
                piece = str(stream.decode(generator.get_next_tokens()[0]))
                if kept is not None:
                    # The spaces that the model's own tokenizer takes off may come in several pieces.
                    kept += piece
                    if not kept.strip(" "):
                        yield None
                        continue
                    piece, kept = strip(kept, self._rules), None
                yield piece
        except RuntimeError as error:
            raise _failed(self.root, error) from error


def generate(speaker: Speaker, prompt: str, *, system: str | None, most_tokens: int, chat: bool) -> Answer:
    """The answer to one prompt; `chat` puts it, after `system` if any, into the model's own template."""
    if not chat:
        return speaker.answer(speaker.encode(prompt, bare=True), most_tokens)
    messages = [*_system(system), {"role": "user", "content": prompt}]
    return speaker.answer(speaker.encode(render_chat(speaker.root, messages), bare=False), most_tokens)


class Conversation:
    """Turns that the model remembers, as many as its context holds beside an answer; then the oldest are forgotten.
    `forgotten` counts these."""

    def __init__(self, speaker: Speaker, *, system: str | None, most_tokens: int) -> None:
        self._speaker, self._system = speaker, _system(system)
        self._most_tokens = most_tokens
        # Room for an answer, as far as a short context has it.
        self._reserve = min(most_tokens, speaker.context_tokens // 4)
        self._turns: list[Message] = []
        self._answer: Answer | None = None
        self.forgotten = 0

    def say(self, text: str) -> Answer:
        """The answer to `text`, which sees what was said before. What of an earlier answer was taken is what was said,
        be it broken off."""
        self._keep_answer()
        asked = [*self._turns, {"role": "user", "content": text}]
        ids = self._ids([*self._system, *asked])
        if len(ids) + self._reserve > self._speaker.context_tokens and len(asked) > 1:
            asked, ids = self._shortened(asked)
        answer = self._speaker.answer(ids, self._most_tokens)
        self._turns, self._answer = asked, answer
        return answer

    def _keep_answer(self) -> None:
        if self._answer is not None:
            self._turns.append({"role": "assistant", "content": self._answer.text})
            self._answer = None

    def _shortened(self, asked: list[Message]) -> tuple[list[Message], list[int]]:
        """The latest turns that leave room for an answer, or the last one alone. Turns go by pairs: templates want
        question and answer in turn."""
        tails = [asked[start:] for start in range(2, len(asked), 2)]
        items = [{"messages": [*self._system, *tail], "add_generation_prompt": True} for tail in tails]
        answers = ask({"task": "chat", "folder": str(self._speaker.root), "items": items})
        for tail, rendered in zip(tails, answers, strict=True):
            if not isinstance(rendered, str):
                raise RuntimeCheckError(
                    f"{self._speaker.root}: the runtime cannot render the chat template: "
                    f"{first_line(rendered['error'])}"
                )
            ids = self._speaker.encode(rendered, bare=False)
            if len(ids) + self._reserve <= self._speaker.context_tokens or tail is tails[-1]:
                self.forgotten += (len(asked) - len(tail)) // 2
                return tail, ids
        raise AssertionError("a conversation that is cut has turns")

    def _ids(self, messages: list[Message]) -> list[int]:
        return self._speaker.encode(render_chat(self._speaker.root, messages), bare=False)


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]


def _failed(root: Path, error: RuntimeError) -> RuntimeCheckError:
    return RuntimeCheckError(f"onnxruntime-genai failed on {root}: {str(error)[:300]}")
