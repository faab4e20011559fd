"""A budget that nothing fits: the deficit term by term, and remedies that are true."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import ArtifactError, InfeasibleBudgetError
from packager.memory.model import MemoryEstimate, MemoryItem, MemoryPhase
from packager.planning.plan import Request, make_plan, smallest_memory
from packager.planning.predicted_memory import predicted_memory
from packager.planning.shortfall import explain
from packager.profile import LEAST_CONTEXT_TOKENS, DeviceProfile, load_profile, parse_profile
from packager.scoremap.opening import OpenedMap, open_map

MIB = 2**20


def device(name: str, memory: str, budget: str = "100%", provider: str = "cpu") -> DeviceProfile:
    text = (
        f'[device]\nmemory = "{memory}"\nbudget = "{budget}"\n[runtime]\nprovider = '
        f'"{provider}"\n[context]\ntokens = 512\n'
    )
    return parse_profile(text, where=name, name=name)


def needs(profile: DeviceProfile, tokens: int) -> MemoryEstimate:
    """60 MiB and 128 KiB a token."""
    items = (
        MemoryItem(name="process", bytes=20 * MIB),
        MemoryItem(name="weights", bytes=40 * MIB),
        MemoryItem(name="kv cache", bytes=tokens * MIB // 8),
    )
    return MemoryEstimate(phases=(MemoryPhase(name="prefill", items=items),))


def test_the_whole_text() -> None:
    profile = device("box", "256MiB", "92MiB")
    found = explain(
        profile,
        budget_bytes=92 * MIB,
        context_tokens=512,
        shortest_tokens=33,
        reserve_bytes=0,
        smallest=needs,
        others=[
            device("large", "4GiB"),
            device("gpu", "1GiB", provider="cuda"),
            device("middling", "1GiB"),
            device("small", "100MiB"),
            profile,
        ],
    )
    assert found.text().splitlines() == [
        "92.0 MiB is too little: the smallest model of this map needs 124 MiB on box at a context of 512 tokens, "
        "32.0 MiB more",
        "  at its peak, in prefill           needs   too much",
        "  process                        20.0 MiB          -  ██████",
        "  weights                        40.0 MiB          -        █████████████",
        "  kv cache                       64.0 MiB   32.0 MiB                     ███████████▒▒▒▒▒▒▒▒▒▒",
        "  together                        124 MiB   32.0 MiB",
        "what would fit:",
        "  --context 256                  the longest context that fits; needs 92.0 MiB of 92.0 MiB",
        "  --budget 124MiB                the least budget that fits, in whole MiB; needs 124 MiB of 124 MiB",
        "  --profile middling             the next larger shipped profile that fits; needs 124 MiB of 1.0 GiB",
    ]


def test_where_nothing_helps_it_says_so() -> None:
    profile = device("box", "59MiB")
    found = explain(
        profile,
        budget_bytes=59 * MIB,
        context_tokens=512,
        shortest_tokens=33,
        reserve_bytes=0,
        smallest=needs,
        others=[],
    )
    assert found.remedies == ()
    assert (
        found.text().splitlines()[-1]
        == "nothing would fit: no shorter context, no smaller cache, no budget on this device, no shipped profile"
    )
    roomy = explain(
        device("box", "1GiB"),
        budget_bytes=59 * MIB,
        context_tokens=512,
        shortest_tokens=33,
        reserve_bytes=0,
        smallest=needs,
        others=[],
    )
    assert roomy.text().splitlines()[-1] == "no context is short enough for this budget"


def test_a_device_without_kernels_for_the_map_is_no_remedy() -> None:
    def picky(profile: DeviceProfile, tokens: int) -> MemoryEstimate:
        if profile.name == "other":
            raise ArtifactError("none of its options runs on this device")
        return needs(profile, tokens)

    found = explain(
        device("box", "59MiB"),
        budget_bytes=1,
        context_tokens=512,
        shortest_tokens=33,
        reserve_bytes=0,
        smallest=picky,
        others=[device("other", "1GiB")],
    )
    assert found.remedies == ()


def test_a_device_with_fewer_kernels_is_no_remedy() -> None:
    """Its weights would be floats: larger because it is poorer, not because it has more room."""
    small = dataclasses.replace(device("small", "92MiB"), bits=(4, 8))
    others = [
        dataclasses.replace(device(name, memory), bits=bits)
        for name, memory, bits in (("floats", "1GiB", ()), ("four", "2GiB", (4,)))
    ]
    richer = dataclasses.replace(device("richer", "4GiB"), bits=(2, 4, 8))

    def remedies(shipped: list[DeviceProfile]) -> list[str]:
        found = explain(
            small,
            budget_bytes=92 * MIB,
            context_tokens=512,
            shortest_tokens=512,
            reserve_bytes=0,
            smallest=needs,
            others=shipped,
        )
        return [item.arguments for item in found.remedies]

    assert remedies(others) == []
    assert remedies([*others, richer]) == ["--profile richer"]


@pytest.mark.parametrize(("budget", "helps"), [(75, False), (76, True)])
def test_a_cache_of_codes_is_a_remedy_where_it_fits(budget: int, helps: bool) -> None:
    def coded(profile: DeviceProfile, tokens: int) -> MemoryEstimate:
        return needs(profile, tokens // 4)

    found = explain(
        device("box", "80MiB"),
        budget_bytes=budget * MIB,
        context_tokens=512,
        shortest_tokens=512,
        reserve_bytes=0,
        smallest=needs,
        others=[],
        coded=coded,
    )
    assert [(item.arguments, item.peak_bytes) for item in found.remedies] == (
        [("--kv-cache int8", 76 * MIB)] if helps else []
    )


@given(st.integers(1, 123 * MIB), st.integers(-10 * MIB, 10 * MIB))
def test_what_lies_beyond_sums_up_to_the_deficit(budget: int, reserve: int) -> None:
    if needs(device("box", "1GiB"), 512).peak_bytes + reserve <= budget:
        return
    found = explain(
        device("box", "1GiB"),
        budget_bytes=budget,
        context_tokens=512,
        shortest_tokens=33,
        reserve_bytes=reserve,
        smallest=needs,
        others=[],
    )
    assert sum(term.bytes for term in found.terms) == found.minimum_bytes == 124 * MIB + reserve
    assert sum(term.beyond_bytes for term in found.terms) == found.minimum_bytes - budget
    assert all(remedy.peak_bytes <= remedy.budget_bytes for remedy in found.remedies)


# With a real map


@pytest.fixture(scope="module")
def loaded(maps: Callable[[str], Path]) -> OpenedMap:
    return open_map(maps("llama"))


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_remedy_is_true_and_the_context_is_the_longest(loaded: OpenedMap, data: st.DataObject) -> None:
    profile = dataclasses.replace(load_profile("edge-box-256mb"), chunk_tokens=32)
    context = data.draw(st.integers(LEAST_CONTEXT_TOKENS + 1, 1024))
    shortest = smallest_memory(loaded, profile, LEAST_CONTEXT_TOKENS).peak_bytes
    budget = data.draw(st.integers(shortest - 10_000, smallest_memory(loaded, profile, context).peak_bytes - 1))
    with pytest.raises(InfeasibleBudgetError) as caught:
        make_plan(loaded, profile, budget_bytes=budget, context_tokens=context)
    assert caught.value.shortfall is not None
    given_ = {item["arguments"].split()[0]: item["arguments"].split()[1] for item in caught.value.shortfall["remedies"]}
    assert {"--budget", "--profile"} <= set(given_)
    make_plan(loaded, profile, budget_bytes=int(given_["--budget"].removesuffix("MiB")) * MIB, context_tokens=context)
    make_plan(loaded, load_profile(given_["--profile"]), context_tokens=context)
    if budget >= shortest:
        tokens = int(given_["--context"])
        make_plan(loaded, profile, budget_bytes=budget, context_tokens=tokens)
        with pytest.raises(InfeasibleBudgetError):
            make_plan(loaded, profile, budget_bytes=budget, context_tokens=tokens + 1)
    else:
        assert "--context" not in given_


def test_the_smallest_memory_is_that_of_the_last_prefix(loaded: OpenedMap) -> None:
    profile = load_profile("edge-box-256mb")
    least = smallest_memory(loaded, profile, 512)
    plan = make_plan(loaded, profile, budget_bytes=least.peak_bytes, context_tokens=512)
    assert plan.memory == predicted_memory(least)
    assert plan.prefix == plan.moves


def test_who_demands_floats_is_told_of_the_cache_that_fits(loaded: OpenedMap) -> None:
    profile = load_profile("edge-box-256mb")
    # Two layers' codes save less than their prefill over floats costs.
    loaded = dataclasses.replace(loaded, geometry=dataclasses.replace(loaded.geometry, layers=24, head_dim=128))
    assert loaded.identity.int8_cache is not None
    assert not loaded.identity.int8_cache.refusal
    budget = smallest_memory(loaded.with_cache("int8"), profile, 1024).peak_bytes
    assert budget < smallest_memory(loaded, profile, 1024).peak_bytes
    request = Request(profile=profile, budget_bytes=budget, context_tokens=1024, cache="float")
    with pytest.raises(InfeasibleBudgetError) as caught:
        request.plan(loaded)
    assert caught.value.shortfall is not None
    assert "--kv-cache int8" in [item["arguments"] for item in caught.value.shortfall["remedies"]]
    assert dataclasses.replace(request, cache="int8").plan(loaded).peak_bytes == budget
    with pytest.raises(InfeasibleBudgetError) as caught:
        dataclasses.replace(request, cache="int8", budget_bytes=budget - 1).plan(loaded)
    assert caught.value.shortfall is not None
    assert "--kv-cache int8" not in [item["arguments"] for item in caught.value.shortfall["remedies"]]
