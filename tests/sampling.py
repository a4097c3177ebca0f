"""A few cases of a large matrix that hold every pair of its values; the whole of it runs under `-m slow`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*factors: Sequence[Any]) -> set[tuple[Any, ...]]:
    """Combinations of one value of each factor such that any two values of two factors meet in one of them.

    Greedy and deterministic: again and again the combination with most pairs that have not met, the first of equals.
    """
    left = {
        (i, a, j, b)
        for i, j in combinations(range(len(factors)), 2)
        for a in range(len(factors[i]))
        for b in range(len(factors[j]))
    }
    chosen = set()
    everything = list(product(*(range(len(factor)) for factor in factors)))
    while left:
        best = max(everything, key=lambda row: len(_pairs(row) & left))
        left -= _pairs(best)
        chosen.add(tuple(factor[i] for factor, i in zip(factors, best, strict=True)))
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def taking_turns(first: Sequence[Any], second: Sequence[Any], *factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every pair of `first` and `second`, with a combination of the other factors: another one for the next pair."""
    turns = list(product(*factors))
    # A step that shares no factor with the number of turns, so that none is left out.
    step = next(n for n in range(len(turns) // 2 + 1, 2 * len(turns)) if math.gcd(n, len(turns)) == 1)
    pairs = [(i * (len(second) + 1) + j, a, b) for i, a in enumerate(first) for j, b in enumerate(second)]
    return [(a, b, *turns[number * step % len(turns)]) for number, a, b in pairs]
