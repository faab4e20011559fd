"""What an argument may be, said once for Python and for the command line.

A rule names what it expects (`str(rule)`), reads it from text (`kind`), and checks a value: UsageError says what was
expected and what was found.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, SupportsIndex, TypeVar

from packager.errors import UsageError
from packager.profile import KV_CACHES, LEAST_CONTEXT_TOKENS, PROVIDERS

Value = TypeVar("Value", covariant=True)
Context = int | Literal["auto"]


class Rule(Protocol[Value]):
    """What an argument may be."""

    @property
    def kind(self) -> Callable[[str], Any]:
        """Text to a value to check; ValueError where it is none."""

    def check(self, value: object) -> Value:
        """`value`, if it may be. UsageError says "expected …, found …"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """A whole number from `least` to `most`, both allowed."""

    least: int
    most: int | None = None
    kind = int

    def __str__(self) -> str:
        if self.most is None:
            return f"a whole number, at least {self.least}"
        return f"a whole number from {self.least} to {self.most}"

    def check(self, value: object) -> int:
        """`value`, or UsageError. Truth values are no numbers; other libraries' integers are."""
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):
            whole = operator.index(value)
            if self.least <= whole and (self.most is None or whole <= self.most):
                return whole
        raise UsageError(f"expected {self}, found {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A finite number above `above`, or at least `least`; at most `most`, or below `below`, where given."""

    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    kind = float

    def __str__(self) -> str:
        upper = f" and at most {self.most:g}" if self.most < math.inf else ""
        upper += f" and below {self.below:g}" if self.below < math.inf else ""
        lower = f"at least {self.least:g}" if self.least > -math.inf else f"above {self.above:g}"
        return f"a finite number{',' if self.least > -math.inf else ''} {lower}{upper}"

    def check(self, value: object) -> float:
        """`value`, or UsageError. Truth values are no numbers."""
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            number = float(value)
            above = math.isfinite(number) and self.above < number and self.least <= number
            if above and number <= self.most and number < self.below:
                return number
        raise UsageError(f"expected {self}, found {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A context: a whole number of at least `least` tokens, or "auto"."""

    least: int

    def __str__(self) -> str:
        return f"at least {self.least} tokens, or 'auto'"

    def kind(self, text: str) -> Context:
        """A number, or the text as it is."""
        return "auto" if text == "auto" else int(text)

    def check(self, value: object) -> Context:
        """`value`, or UsageError."""
        if isinstance(value, str) and value == "auto":
            return "auto"
        try:
            return Whole(least=self.least).check(value)
        except UsageError:
            raise UsageError(f"expected {self}, found {value!r}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]
    kind = str

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"

    def check(self, value: object) -> str:
        """`value`, or UsageError."""
        if isinstance(value, str) and value in self.words:
            return value
        raise UsageError(f"expected {self}, found {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A torch device that scores; whether it is there is found out later."""

    kind = str

    def __str__(self) -> str:
        return "cpu, cuda or cuda:N"

    def check(self, value: object) -> str:
        """`value`, or UsageError."""
        if isinstance(value, str) and re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", value):
            return value
        raise UsageError(f"expected {self}, found {value!r}")


TOKENS = Whole(least=1)
SEED = Whole(least=0, most=2**63 - 1)
SIZES = Whole(least=2, most=1000)
WINDOWS = Whole(least=1)
ANSWER_TOKENS = Whole(least=1)
TEMPERATURE = Number(least=0, most=100)
TOP_P = Number(above=0, most=1)
TOP_K = Whole(least=0, most=2**31 - 1)
SAMPLING_SEED = Whole(least=0, most=2**31 - 1)
CONTEXT_TOKENS = Whole(least=LEAST_CONTEXT_TOKENS)
"""Of these the plan keeps 32 for an answer; one is left for a prompt."""
CONTEXT = Tokens(least=CONTEXT_TOKENS.least)
MINUTES = Number(above=0, most=24 * 60)
BUDGET_BYTES = Whole(least=1)
FILE_BYTES = Whole(least=1)
RISE_NATS = Number(above=0)
RATIO = Number(above=0)
KV_CACHE = OneOf(words=KV_CACHES)
PROVIDER = OneOf(words=PROVIDERS)
METHOD = OneOf(words=("curvature", "acip"))
DEVICE = Device()
ACIP_BASIS = OneOf(words=("curvature", "weights"))
ACIP: dict[str, Rule[Any]] = {
    "steps": Whole(least=1),
    "step_tokens": Whole(least=2),
    "tuning_steps": Whole(least=0),
    "adapter_rank": Whole(least=1),
    "adapter_rate": Number(above=0),
    "stop_ratio": Number(above=0, below=1),
    "basis": ACIP_BASIS,
}
"""Settings of ACIP that may be asked for, by their names in `AcipSettings`."""


def checked(rule: Rule[Value], value: object, name: str) -> Value:
    """`value` as argument `name`. UsageError: "NAME: expected …, found …"."""
    try:
        return rule.check(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def as_path(value: object, name: str) -> Path:
    """`value` as a path; UsageError where it is none, or empty."""
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str) and os.fspath(value):
        return Path(value)
    raise UsageError(f"{name}: expected a path, as text or as a Path, found {value!r}")


def as_paths(value: object, name: str) -> tuple[Path, ...]:
    """`value`, None or one path or several, as paths."""
    if value is None:
        return ()
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        return (as_path(value, name),)
    return tuple(as_path(item, f"{name}[{number}]") for number, item in enumerate(value))


def as_text(value: object, name: str) -> str:
    """`value` as text; UsageError where it is none."""
    if isinstance(value, str):
        return value
    raise UsageError(f"{name}: expected text, found {value!r}")


def as_flag(value: object, name: str) -> bool:
    """`value` as a truth value; UsageError where it is none."""
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name}: expected True or False, found {value!r}")
