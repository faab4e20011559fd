"""Context for weights: which lengths of context to try, and which of what they give is worth offering.

Pure functions over numbers of tokens; `plan.context_frontier` asks the solver what each length costs.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence


def steps(least: int, most: int) -> list[int]:
    """Both ends, and between them the powers of two and what lies halfway between those: 512, 768, 1024, 1536, …"""
    ladder = {whole for power in range(most.bit_length()) for whole in (1 << power, 3 << power)}
    return sorted({least, most} | {tokens for tokens in ladder if least < tokens < most})


def longest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The most tokens from `least` to `most` that fit, None where not even the least do. What fits must fit with fewer
    tokens too."""
    count = bisect.bisect_left(range(least, most + 1), True, key=lambda tokens: not fits(tokens))
    return least + count - 1 if count else None


def undominated(points: Sequence[tuple[int, float]]) -> list[int]:
    """Numbers of the (tokens, loss) points that no other beats in one and equals or beats in the other, by rising
    tokens.

    Of points that are the same in both, the first stays.
    """
    kept: list[int] = []
    for number in sorted(range(len(points)), key=lambda at: (-points[at][0], points[at][1], at)):
        if not kept or points[number][1] < points[kept[-1]][1]:
            kept.append(number)
    return kept[::-1]
