"""A few cases of a large matrix that hold every pair of its values; the whole of it runs under `-m slow`."""

from __future__ import annotations

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
