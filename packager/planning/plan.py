"""A plan: the option of every unit for one device, with what it is predicted to weigh, cost and need.

The same map, profile and budget give the same bytes of `plan.json`: it holds no clock and no path.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from packager.errors import ArtifactError, InfeasibleBudgetError, UsageError
from packager.forms.kinds import Kind
from packager.forms.registry import Form, form_bytes, form_nodes, has_kernels, parse_form
from packager.io.files import read_json, sha256_json
from packager.io.records import Amount, Count, Dimension, Positive, from_plain, shown
from packager.memory.geometry import Geometry
from packager.memory.model import MemoryEstimate, estimate, looked_up_bytes, resident_bytes
from packager.planning import contexts, kv_cache_choice
from packager.planning.predicted_memory import PredictedMemory, predicted_memory
from packager.planning.shortfall import explain
from packager.planning.solver import Solution, choice_at, solve, total_bytes, total_loss
from packager.planning.target import Missed, Sizes, Target, out_of_reach
from packager.profile import (
    AUTO,
    FLOAT,
    INT8,
    LEAST_CONTEXT_TOKENS,
    PROMPT_RESERVE,
    DeviceProfile,
    MemoryCoefficients,
    load_profile,
    shipped_profiles,
)
from packager.scoremap.anchors import predicted_nats
from packager.scoremap.model import ScoreMap, Unit, restricted, reweighed
from packager.scoremap.opening import OpenedMap
from packager.sizes import format_size

SCHEMA = 1
PLAN_FILE = "plan.json"
NO_TARGET = Target()
NO_DEVICE = "laptop-16gb"
"""The profile that stands where no device is named, as for a curve of file sizes: its graphs run on any CPU, and it
bounds nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to build. `choices` maps unit name → form label; bytes and nats as their names say.

    `ratio` is file bytes over the bytes of the float16 model. `memory` is the predicted peak, item by item. `cache` is
    float or int8, of which `cache_nats` is the share of `loss_nats`; `cache_note` says what stood against it.
    `margin_bytes` are kept free beside the predicted peak, since nothing is measured. `bound` says which of the
    target's bounds the size met, empty in plans of versions that had but one; `allowed_bytes` of weights would have
    kept them all.
    """

    schema: int
    map_sha256: str
    profile: str
    profile_sha256: str
    budget_bytes: Positive
    context_tokens: Dimension
    prompt_tokens: Dimension
    choices: dict[str, str]
    prefix: Count
    moves: Count
    file_bytes: Count
    ratio: Amount
    loss_nats: float
    peak_bytes: Count
    memory: PredictedMemory
    cache: str = FLOAT
    cache_nats: float = 0.0
    cache_note: str = ""
    margin_bytes: int = 0
    bound: str = ""
    allowed_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `plan.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> Plan:
        """The plan in `data`, read from `where`; unknown and missing keys are errors."""
        if data.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{where} has schema {shown(data.get('schema'))}, this version reads {SCHEMA}: plan again"
            )
        return from_plain(cls, data, where)


def is_plan(path: Path) -> bool:
    """Whether a file is a plan of ours, of whatever version, that another may replace."""
    try:
        return {"schema", "map_sha256", "choices"} <= read_json(path).keys()
    except ArtifactError:
        return False


def profile_hash(profile: DeviceProfile) -> str:
    """Hash of everything a profile says."""
    return sha256_json(asdict(profile))


def runnable(scoremap: ScoreMap, profile: DeviceProfile) -> ScoreMap:
    """The map with only the forms that the device has kernels for."""
    return restricted(scoremap, lambda unit, form: has_kernels(form, profile.bits))


def make_plan(
    opened: OpenedMap,
    profile: DeviceProfile,
    *,
    budget_bytes: int | None = None,
    context_tokens: int | None = None,
    reserve_bytes: int = 0,
    margin_bytes: int = 0,
    target: Target = NO_TARGET,
) -> Plan:
    """The model of `opened` for a target: the smallest that is as good as the largest whose predicted peak, plus
    `reserve_bytes` and `margin_bytes`, fits the budget on this device; see `Target` for other wishes.

    Raises InfeasibleBudgetError, which says what is missing and what would fit, when even the smallest does not fit or
    keeps no other bound; UsageError for a context longer than the model's or a budget above the device's memory.
    """
    budget = profile.budget_bytes if budget_bytes is None else budget_bytes
    context = bounded_context(opened, profile, context_tokens)
    if budget > profile.memory_bytes:
        raise UsageError(
            f"budget {format_size(budget)} is more than the {format_size(profile.memory_bytes)} that {profile.name} has"
        )

    def weigh(unit: Unit, form: Form) -> int:
        return _weigh(unit, form, opened.geometry, profile, context)[0]

    view = reweighed(runnable(opened.scoremap, profile), weigh)
    needed = _estimator(opened.geometry, view, profile, context)
    solution = solve(view, lambda choice: needed(choice).peak_bytes + reserve_bytes + margin_bytes <= budget)
    if solution is None:
        raise _infeasible(opened, profile, budget, context, reserve_bytes, margin_bytes)
    sizes = Sizes(opened, view, profile.provider, context, target)

    def nats(choice: Sequence[int]) -> float:
        return _nats(opened, view, choice)

    def minimum(prefix: int) -> int:
        return needed(choice_at(view, prefix)).peak_bytes + reserve_bytes + margin_bytes

    found = sizes.choose(solution, nats)
    if isinstance(found, Missed):
        raise out_of_reach(view, target, found, nats, budget, minimum)
    plan = _plan(opened, view, found.solution, needed(found.solution.choice), profile, budget, context)
    return replace(plan, margin_bytes=margin_bytes, bound=found.bound, allowed_bytes=found.allowed_bytes)


def context_frontier(
    opened: OpenedMap,
    profile: DeviceProfile,
    *,
    budget_bytes: int | None = None,
    reserve_bytes: int = 0,
    margin_bytes: int = 0,
    target: Target = NO_TARGET,
) -> tuple[Plan, ...]:
    """What the budget can be spent on: plans of ever longer context at ever higher predicted loss, none of them
    dominated.

    They begin at the profile's minimum context, or at the longest that costs no more loss than it, and end at the
    longest at which anything fits. Raises as `make_plan` does, for the minimum context.
    """
    budget = profile.budget_bytes if budget_bytes is None else budget_bytes
    most = opened.identity.model.max_context_tokens
    least = min(profile.minimum_context_tokens, most)

    def planned(tokens: int) -> Plan:
        return make_plan(
            opened,
            profile,
            budget_bytes=budget,
            context_tokens=tokens,
            reserve_bytes=reserve_bytes,
            margin_bytes=margin_bytes,
            target=target,
        )

    def fits(tokens: int) -> bool:
        if smallest_memory(opened, profile, tokens).peak_bytes + reserve_bytes + margin_bytes > budget:
            return False
        if target.max_rise_nats is None and not target.bounds_files:
            return True
        try:
            planned(tokens)
        except InfeasibleBudgetError:
            return False
        return True

    first = planned(least)
    longest = contexts.longest(fits, least, most)
    plans = [first, *(planned(tokens) for tokens in contexts.steps(least, longest or least)[1:])]
    return undominated(plans)


def undominated(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans that no other beats in context or loss and equals in the other, by rising context."""
    return tuple(plans[at] for at in contexts.undominated([(plan.context_tokens, plan.loss_nats) for plan in plans]))


def smallest_memory(opened: OpenedMap, profile: DeviceProfile, context: int) -> MemoryEstimate:
    """What the smallest model of `opened` needs on this device: every unit in the runnable option of the fewest
    resident bytes."""
    smallest = []
    for unit, chain in zip(opened.scoremap.units, runnable(opened.scoremap, profile).options, strict=True):
        smallest.append(
            min(
                (_weigh(unit, option.form, opened.geometry, profile, context) for option in chain),
                key=lambda weights: weights[0],
            )
        )
    return _estimated(opened.geometry, smallest, profile, context)


Planned = TypeVar("Planned")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to build for: a profile, with budget, context and cache overridden where given; AUTO trades context for
    weights. `margin_bytes` are kept free beside the prediction, and `target` may bound more than memory."""

    profile: DeviceProfile
    budget_bytes: int | None = None
    context_tokens: int | Literal["auto"] | None = None
    cache: str | None = None
    margin_bytes: int = 0
    target: Target = NO_TARGET

    def unmeasured(self) -> Request:
        """The same where nothing will be measured: with the device's margin."""
        return replace(self, margin_bytes=self.profile.coefficients.margin_bytes)

    @property
    def wanted_tokens(self) -> int:
        """The profile's context where that is what to build for, else 0."""
        return self.profile.context_tokens if self.context_tokens is None else 0

    def frontier(self, opened: OpenedMap, reserve_bytes: int = 0) -> tuple[Plan, ...]:
        """What there is to choose from where the context is AUTO, with any cache on offer; `plan` takes the first."""

        def planned(view: OpenedMap) -> tuple[Plan, ...]:
            return context_frontier(
                view,
                self.profile,
                budget_bytes=self.budget_bytes,
                reserve_bytes=reserve_bytes,
                margin_bytes=self.margin_bytes,
                target=self.target,
            )

        found, _, note = self._tried(opened, planned)
        plans = [replace(plan, cache_note=note) for plan in itertools.chain(*found)]
        return undominated(sorted(plans, key=lambda plan: plan.context_tokens))

    def plan(self, opened: OpenedMap, reserve_bytes: int = 0) -> Plan:
        """The plan for this request; `reserve_bytes` more (or, negative, fewer) than predicted are kept free."""
        context = self.context_tokens
        if context == AUTO:
            return self.frontier(opened, reserve_bytes)[0]

        def planned(view: OpenedMap) -> Plan:
            return make_plan(
                view,
                self.profile,
                budget_bytes=self.budget_bytes,
                context_tokens=context,
                reserve_bytes=reserve_bytes,
                margin_bytes=self.margin_bytes,
                target=self.target,
            )

        found, kinds, note = self._tried(opened, planned)
        return chosen(found, kinds, note, smallest=self.target.max_rise_nats is not None)

    def _tried(
        self, opened: OpenedMap, planned: Callable[[OpenedMap], Planned]
    ) -> tuple[list[Planned], Sequence[str], str]:
        """What `planned` makes of every cache on offer that fits, the kinds that were tried, and why others were not.

        Raises InfeasibleBudgetError, of the cache that needs least, when none fits.
        """
        kinds, note = kv_cache_choice.offered(
            opened.identity, self.profile.provider, self.cache or self.profile.kv_cache
        )
        found, refused = [], list[InfeasibleBudgetError]()
        for kind in kinds:
            try:
                found.append(planned(opened.with_cache(kind)))
            except InfeasibleBudgetError as error:
                refused.append(error)
        if not found:
            raise min(refused, key=lambda error: error.minimum_bytes)
        return found, kinds, note


def chosen(plans: Sequence[Plan], kinds: Sequence[str], note: str = "", *, smallest: bool = False) -> Plan:
    """The plan of the least predicted loss or, where all are good enough, of the least memory; the first of equals,
    saying what stood against it. `kinds` were tried."""
    best = min(plans, key=lambda plan: plan.peak_bytes if smallest else plan.loss_nats)
    others = [
        f"with a {plan.cache} cache the loss would be +{plan.loss_nats:.4f}" for plan in plans if plan is not best
    ]
    others += [f"with a {kind} cache nothing fits" for kind in kinds if kind not in {plan.cache for plan in plans}]
    return replace(best, cache_note="; ".join([note] if note else others))


def plan_file_bytes(opened: OpenedMap, profile: DeviceProfile, weight_bytes: int) -> Plan:
    """The best model of at most `weight_bytes` bytes of weights in the file that the device has kernels for, whatever
    memory it needs."""
    view = runnable(opened.scoremap, profile)
    solution = solve(view, lambda choice: total_bytes(view, choice) <= weight_bytes)
    context = bounded_context(opened, profile, None)
    if solution is None:
        minimum = sum(chain[-1].bytes for chain in view.options)
        raise InfeasibleBudgetError(
            f"the smallest model of this map has {format_size(minimum)} of weights, more than "
            f"{format_size(weight_bytes)}",
            budget_bytes=weight_bytes,
            minimum_bytes=minimum,
        )
    memory = _estimator(opened.geometry, view, profile, context)(solution.choice)
    return _plan(opened, view, solution, memory, profile, memory.peak_bytes, context)


def bounded_context(opened: OpenedMap, profile: DeviceProfile, context_tokens: int | None) -> int:
    """The context to build for: as asked, else the profile's, never more than the model was made for."""
    longest = opened.identity.model.max_context_tokens
    if context_tokens is None:
        return min(profile.context_tokens, longest)
    if not LEAST_CONTEXT_TOKENS <= context_tokens <= longest:
        raise UsageError(
            f"context {context_tokens} tokens: expected at least {LEAST_CONTEXT_TOKENS} and at most {longest}, "
            "the model's own"
        )
    return context_tokens


def _estimator(
    geometry: Geometry, scoremap: ScoreMap, profile: DeviceProfile, context: int
) -> Callable[[Sequence[int]], MemoryEstimate]:
    """choice → predicted memory. What each option weighs is worked out once: the solver asks hundreds of times."""
    weights = [
        [_weigh(unit, option.form, geometry, profile, context) for option in chain]
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
    ]

    return lambda choice: _estimated(
        geometry, [chain[index] for chain, index in zip(weights, choice, strict=True)], profile, context
    )


def _estimated(
    geometry: Geometry, taken: Sequence[tuple[int, int, int]], profile: DeviceProfile, context: int
) -> MemoryEstimate:
    """Predicted memory of a model whose units weigh as `_weigh` says."""
    return estimate(
        geometry,
        weights_bytes=sum(resident for resident, _, _ in taken),
        looked_up_bytes=sum(looked_up for _, looked_up, _ in taken),
        largest_unit_bytes=max(multiplied for _, _, multiplied in taken),
        context_tokens=context,
        prompt_tokens=context - PROMPT_RESERVE,
        chunk_tokens=geometry.chunk_tokens(profile.chunk_tokens, context),
        coefficients=profile.coefficients,
    )


def _weigh(unit: Unit, form: Form, geometry: Geometry, profile: DeviceProfile, context: int) -> tuple[int, int, int]:
    """(resident bytes, those only looked up, file bytes of what is multiplied) of a unit in a form."""
    # A part of the vocabulary is looked up by its share of the tokens. What is only multiplied does not depend on them.
    tokens = -(-context * unit.rows // geometry.vocab) if unit.kind in ("embedding", "tied") else None
    # Rows beyond the tokenizer's entries have no token: nothing looks them up.
    named = min(unit.rows, max(0, (geometry.tokenizer_entries or geometry.vocab) - unit.start))
    return _weighed(form, unit.rows, unit.cols, unit.kind, profile.coefficients, tokens, named)


@functools.lru_cache(maxsize=1 << 14)
def _weighed(
    form: Form, rows: int, cols: int, kind: Kind, coefficients: MemoryCoefficients, tokens: int | None, named: int
) -> tuple[int, int, int]:
    """As `_weigh` says. Kept, because layers share a few shapes, and caches and contexts share most of what they
    weigh."""
    resident = resident_bytes(
        form, rows, cols, kind=kind, coefficients=coefficients, context_tokens=tokens, named_rows=named
    )
    # The skeleton's nodes are in the geometry; what a form adds to them weighs too.
    resident += (form_nodes(form) - 1) * coefficients.session_bytes_per_node
    looked_up = looked_up_bytes(
        form, rows, cols, kind=kind, coefficients=coefficients, context_tokens=tokens, named_rows=named
    )
    return resident, looked_up, 0 if kind == "embedding" else form_bytes(form, rows, cols)


def _plan(
    opened: OpenedMap,
    view: ScoreMap,
    solution: Solution,
    memory: MemoryEstimate,
    profile: DeviceProfile,
    budget: int,
    context: int,
) -> Plan:
    forms = [chain[taken].form for chain, taken in zip(view.options, solution.choice, strict=True)]
    file_bytes = sum(form_bytes(form, unit.rows, unit.cols) for form, unit in zip(forms, view.units, strict=True))
    return Plan(
        schema=SCHEMA,
        map_sha256=opened.sha256,
        profile=profile.name,
        profile_sha256=profile_hash(profile),
        budget_bytes=budget,
        context_tokens=context,
        prompt_tokens=context - PROMPT_RESERVE,
        choices={unit.name: form.label for unit, form in zip(view.units, forms, strict=True)},
        prefix=solution.prefix,
        moves=len(view.moves),
        file_bytes=file_bytes,
        ratio=file_bytes / opened.identity.model.float16_bytes,
        loss_nats=_nats(opened, view, solution.choice),
        peak_bytes=memory.peak_bytes,
        memory=predicted_memory(memory),
        cache=opened.cache,
        cache_nats=opened.cache_nats,
    )


def _nats(opened: OpenedMap, view: ScoreMap, choice: Sequence[int]) -> float:
    """Predicted rise of the loss, in nats per token."""
    return predicted_nats(opened.anchors, total_loss(view, choice)) + opened.cache_nats


def _infeasible(
    opened: OpenedMap, profile: DeviceProfile, budget: int, context: int, reserve: int, margin: int
) -> InfeasibleBudgetError:
    int8_left = opened.cache == FLOAT and INT8 in kv_cache_choice.offered(opened.identity, profile.provider, AUTO)[0]
    shortfall = explain(
        profile,
        budget_bytes=budget,
        context_tokens=context,
        shortest_tokens=LEAST_CONTEXT_TOKENS,
        reserve_bytes=reserve,
        margin_bytes=margin,
        smallest=lambda device, tokens: smallest_memory(opened, device, tokens),
        others=[load_profile(name) for name in shipped_profiles()],
        coded=(lambda device, tokens: smallest_memory(opened.with_cache(INT8), device, tokens)) if int8_left else None,
    )
    return InfeasibleBudgetError(
        shortfall.text(), budget_bytes=budget, minimum_bytes=shortfall.minimum_bytes, shortfall=shortfall.to_dict()
    )


def read_plan(path: Path) -> Plan:
    """The plan in a `plan.json`."""
    return Plan.from_dict(read_json(path), str(path))


def form_of(plan: Plan, unit: Unit) -> Form:
    """The form the plan chose for a unit."""
    return parse_form(plan.choices[unit.name])
