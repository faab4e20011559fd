"""What a size is bounded by beside the device's memory, and where more bytes win nothing.

A model must fit its memory budget. Beside that it may have a largest file, or a largest share of the float16 model;
and of all sizes that fit, the plan takes the smallest that is as good as the best (the knee), the smallest whose
predicted rise is small enough, or all that fits. Sizes are prefixes of one list of moves, so they stay nested.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from packager.errors import InfeasibleBudgetError, UsageError
from packager.forms.registry import form_bytes, form_nodes
from packager.graph.skeleton_bytes import skeleton_bytes
from packager.planning.solver import Solution, choice_at
from packager.profile import INT8
from packager.scoremap.model import ScoreMap
from packager.scoremap.opening import OpenedMap
from packager.sizes import format_size

KNEE_NATS: Final = 0.002
"""A rise of the loss that nobody could measure: about one standard error over 30,000 tokens of held-out text."""
BUDGET, MAX_RISE, FILE_SIZE, RATIO, KNEE, LARGEST = "budget", "max-rise", "file-size", "ratio", "knee", "largest"
_NEAR_SHARE = 0.05
"""Of the allowed weights: what stops so near to a bound has met that bound, and not only the knee."""
# What surgery writes beside a unit's bytes, at most: nodes with their names, and a tensor's entry and alignment.
_NODE_BYTES = 1024
_TENSOR_BYTES = 512
# A layer that reads a cache of codes: the nodes of prefill over floats, and the steps' entries.
_CODED_LAYER_BYTES = 20 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Bounds beside the budget, None where there is none.

    `max_rise_nats`: take the smallest model whose predicted rise of the loss is at most that. `most_bytes`: of graph
    and weights together. `most_ratio`: of weights, to the float16 model's bytes. `fill`: take all that fits.
    """

    max_rise_nats: float | None = None
    most_bytes: int | None = None
    most_ratio: float | None = None
    fill: bool = False

    def __post_init__(self) -> None:
        if self.fill and self.max_rise_nats is not None:
            raise UsageError(
                "fill takes the largest model that fits, max-rise the smallest that is good enough: give one of them"
            )

    @property
    def bounds_files(self) -> bool:
        """Whether something bounds the files, and not only the memory."""
        return self.most_bytes is not None or self.most_ratio is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """A solution, which bound it met, and the bytes of weights that all bounds would have allowed."""

    solution: Solution
    bound: str
    allowed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Missed:
    """No size that fits the memory keeps `bound`: the best of those that keep the others loses `best_nats`, or the
    smallest has `missing_bytes` too many."""

    bound: str
    best_nats: float = 0.0
    missing_bytes: int = 0


class Sizes:
    """The prefixes of one view of a map, and what the files of each weigh."""

    def __init__(self, opened: OpenedMap, view: ScoreMap, provider: str, context_tokens: int, target: Target) -> None:
        self._view, self._target = view, target
        self._weights = [
            [form_bytes(option.form, unit.rows, unit.cols) for option in chain]
            for unit, chain in zip(view.units, view.options, strict=True)
        ]
        self._limits: list[tuple[str, list[list[int]], int]] = []
        if target.most_bytes is not None:
            tables = self._with_graph()
            limit = target.most_bytes - _graph_bytes(opened, provider, context_tokens)
            self._limits.append((FILE_SIZE, tables, limit))
        if target.most_ratio is not None:
            self._limits.append((RATIO, self._weights, int(target.most_ratio * opened.identity.model.float16_bytes)))

    def weight_bytes(self, choice: Sequence[int]) -> int:
        """Bytes of the chosen options in the file."""
        return _summed(self._weights, choice)

    def files_over(self, choice: Sequence[int]) -> str | None:
        """The first bound on files that the choice exceeds, None where it keeps all."""
        return next((name for name, tables, limit in self._limits if _summed(tables, choice) > limit), None)

    def _missed_files(self) -> Missed:
        last = choice_at(self._view, len(self._view.moves))
        over = [(name, _summed(tables, last) - limit) for name, tables, limit in self._limits]
        name, missing = next(item for item in over if item[1] > 0)
        return Missed(bound=name, missing_bytes=missing)

    def choose(self, solution: Solution, nats: Callable[[Sequence[int]], float]) -> Chosen | Missed:
        """The size for the target, at most as large as `solution`, which fits the memory; or what none of them keeps.

        Predicted loss falls with every bound that grows, and choices are nested. So that both hold, the one step that
        leftover bytes take back counts only where memory alone bounds the size and the step wins more than the knee.
        """
        view, target = self._view, self._target
        kept = [self.files_over(choice_at(view, count)) is None for count in range(len(view.moves) + 1)]
        first = next((count for count in range(solution.prefix, len(kept)) if kept[count]), None)
        if first is None:
            return self._missed_files()
        plain = choice_at(view, first)
        stepped = list(solution.choice) if not target.bounds_files and target.max_rise_nats is None else plain
        bound = LARGEST if first == 0 else BUDGET
        if first > solution.prefix:
            bound = self.files_over(choice_at(view, first - 1)) or BUDGET
        allowed = self.weight_bytes(stepped)
        if target.fill:
            return Chosen(solution=Solution(choice=tuple(stepped), prefix=first), bound=bound, allowed_bytes=allowed)
        if target.max_rise_nats is None:
            limit, smaller = nats(stepped) + KNEE_NATS, KNEE
        else:
            limit, smaller = target.max_rise_nats, MAX_RISE
            if nats(plain) > limit:
                return Missed(bound=MAX_RISE, best_nats=nats(plain))
        if nats(plain) > limit:
            return Chosen(solution=Solution(choice=tuple(stepped), prefix=first), bound=bound, allowed_bytes=allowed)
        low, high = first, len(view.moves)  # the last prefix within the limit: loss rises with every move
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if nats(choice_at(view, middle)) <= limit else (low, middle - 1)
        count = next(count for count in range(low, first - 1, -1) if kept[count])
        choice = tuple(choice_at(view, count))
        if smaller == MAX_RISE or self.weight_bytes(choice) < (1 - _NEAR_SHARE) * allowed:
            bound = smaller
        return Chosen(solution=Solution(choice=choice, prefix=count), bound=bound, allowed_bytes=allowed)

    def _with_graph(self) -> list[list[int]]:
        """As the weights, with what each option adds to the graph, at most."""
        return [
            [
                size
                + 2 * _NODE_BYTES * form_nodes(option.form)
                + _TENSOR_BYTES * 2 * len(option.form.tensors(unit.rows, unit.cols))
                for size, option in zip(sizes, chain, strict=True)
            ]
            for sizes, unit, chain in zip(self._weights, self._view.units, self._view.options, strict=True)
        ]


def out_of_reach(
    view: ScoreMap,
    target: Target,
    missed: Missed,
    nats: Callable[[Sequence[int]], float],
    budget_bytes: int,
    needed_bytes: Callable[[int], int],
) -> InfeasibleBudgetError:
    """The error that says which bound no size keeps, and what is possible; `needed_bytes` is the budget that a prefix
    needs."""
    if missed.bound == MAX_RISE:
        assert target.max_rise_nats is not None
        good = bisect.bisect_right(
            range(len(view.moves) + 1), target.max_rise_nats, key=lambda count: nats(choice_at(view, count))
        )
        needed = needed_bytes(max(0, good - 1))
        text = (
            f"a rise of at most {target.max_rise_nats:g} nats per token is out of reach: the best model within the "
            f"other bounds is predicted to lose {missed.best_nats:.4f}"
        )
        if good and needed > budget_bytes:
            text += f"; the smallest that is good enough needs a budget of {format_size(needed)} ({needed:,} bytes)"
        return InfeasibleBudgetError(text, budget_bytes=budget_bytes, minimum_bytes=needed)
    if missed.bound == FILE_SIZE:
        assert target.most_bytes is not None
        least = target.most_bytes + missed.missing_bytes
        text = (
            f"a file size of {format_size(target.most_bytes)} is too little: graph and weights of the smallest model "
            f"of this map may take {format_size(least)} ({least:,} bytes)"
        )
    else:
        text = (
            f"a ratio of {target.most_ratio:g} is too little: the smallest model of this map has "
            f"{format_size(missed.missing_bytes)} of weights more"
        )
    needed = needed_bytes(len(view.moves))
    return InfeasibleBudgetError(text, budget_bytes=budget_bytes, minimum_bytes=needed)


def _graph_bytes(opened: OpenedMap, provider: str, context_tokens: int) -> int:
    """Bytes of a bundle's graph and constants beside what its units add, at most."""
    size, tensors = skeleton_bytes(opened.folder.skeleton(provider).graph, context_tokens)
    geometry = opened.geometry
    size += _TENSOR_BYTES * tensors
    if opened.cache == INT8:
        steps = 2 * 4 * geometry.kv_heads * geometry.head_dim
        size += geometry.layers * (_CODED_LAYER_BYTES + steps)
    return size


def _summed(tables: Sequence[Sequence[int]], choice: Sequence[int]) -> int:
    return sum(chain[taken] for chain, taken in zip(tables, choice, strict=True))
