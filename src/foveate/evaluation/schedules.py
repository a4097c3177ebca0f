"""Searches for schedules of rates, on any function that scores one. No model is needed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch

from foveate.methods.psigmoid import sigmoid_rates

from .bayes import Unit, suggest

Rates = tuple[float, ...]
STEEPNESS = (2.0, 60.0)
FLAT: Unit = (0.0, 1.0)  # the curve that falls least: what an S has to beat
BUDGETS = tuple(step / 20 for step in range(1, 20))
RANDOM, GUIDED = 8, 16


@dataclass(frozen=True)
class Trial:
    """What a schedule scored, in [0, 1], and the standard error of its difference to the untouched model's score."""

    score: float
    error: float


class Trials:
    """Scores of schedules, each asked for once. bar: the least score that passes; asked: what is known, in order."""

    def __init__(self, ask: Callable[[Rates], Trial], bar: float) -> None:
        self._ask, self.bar = ask, bar
        self.asked: dict[Rates, Trial] = {}

    def __call__(self, rates: Sequence[float]) -> Trial:
        """What a schedule scores."""
        rates = tuple(rates)
        if rates not in self.asked:
            self.asked[rates] = self._ask(rates)
        return self.asked[rates]

    def passes(self, rates: Sequence[float]) -> bool:
        """Whether a schedule scores no less than the bar."""
        return self(rates).score >= self.bar

    def doubtful(self, rates: Sequence[float]) -> bool:
        """Whether one standard error more or less could decide otherwise."""
        trial = self(rates)
        return abs(trial.score - self.bar) <= trial.error

    def contradictions(self) -> list[tuple[Rates, Rates]]:
        """Pairs that say a score is not monotone: the second keeps no more in any layer, and passes where the first
        fails."""
        return [
            (more, less)
            for more, less in permutations(self.asked, 2)
            if self.passes(less) and not self.passes(more) and all(a >= b for a, b in zip(more, less, strict=True))
        ]


# G-Search ---------------------------------------------------------------------------------------------------------


def greedy(trials: Trials, layers: int, grid: Sequence[float]) -> Rates:
    """From the first layer to the last, the least rate of the grid that passes while all deeper layers carry it too.

    Bisects, as if a lower rate never scored better; where a score lies within one standard error of the bar, it goes on
    downwards step by step. `settle` verifies the end. layers: how many have a rate. grid: ascending, in [0, 1); a 0
    counts from the second layer on.
    """
    rates: Rates = ()
    while len(rates) < layers:
        lower = [value for value in grid if value < (rates[-1] if rates else 1.0) and (value or rates)]

        def candidate(index: int, front: Rates = rates, lower: Sequence[float] = lower) -> Rates:
            return (*front, *[lower[index]] * (layers - len(front)))

        failed, passed = -1, len(lower)
        while passed - failed > 1:
            middle = (failed + passed) // 2
            failed, passed = (failed, middle) if trials.passes(candidate(middle)) else (middle, passed)
        below = passed - 1
        while below >= 0 and trials.doubtful(candidate(below)):
            passed = below if trials.passes(candidate(below)) else passed
            below -= 1
        rates = (*rates, lower[passed] if passed < len(lower) else (rates[-1] if rates else 1.0))
    return rates


def neighbours(rates: Rates, grid: Sequence[float], step: int) -> Iterator[Rates]:
    """The schedules that are one step of the grid lower (-1) or higher (1) in one layer, and in others as they must be:
    deeper ones keep no more, shallower ones no less."""
    values = sorted({*grid, 1.0, *rates})
    seen = {rates}
    for layer, rate in enumerate(rates):
        index = values.index(rate) + step
        if 0 <= index < len(values):
            new = values[index]
            changed = (
                tuple(rate if i < layer else min(rate, new) for i, rate in enumerate(rates))
                if step < 0
                else tuple(max(rate, new) if i <= layer else rate for i, rate in enumerate(rates))
            )
            if changed not in seen and any(changed):
                seen.add(changed)
                yield changed


def settle(trials: Trials, rates: Rates, grid: Sequence[float]) -> Rates:
    """The schedule, or a lower one that passes: goes down as long as a neighbour below passes. Then asks those above,
    too, so that `Trials.contradictions` knows them."""
    while (lower := next((one for one in neighbours(rates, grid, -1) if trials.passes(one)), None)) is not None:
        rates = lower
    for higher in neighbours(rates, grid, 1):
        trials(higher)
    return rates


# P-Sigmoid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Options of `psigmoid`."""

    keep: float
    steepness: float
    floor: float

    def rates(self, layers: int) -> Rates:
        """Of layers 1 to `layers`."""
        share = torch.tensor([self.keep], dtype=torch.float64)
        return tuple(sigmoid_rates(share, self.steepness, self.floor, layers + 1)[0].tolist())

    @classmethod
    def at(cls, keep: float, point: Unit) -> Curve:
        """The curve at a point of the unit square: steepness on a scale of ratios, floor as a part of `keep`."""
        low, high = STEEPNESS
        return cls(keep, round(low * (high / low) ** point[0], 3), round(0.99 * keep * point[1], 4))


def best_curve(trials: Trials, layers: int, keep: float, seed: int, first: Sequence[Unit] = ()) -> tuple[Curve, Unit]:
    """The curve of this mean that passes, or the best there was: `first`, then random ones, then those that a Gaussian
    process expects most of.

    Stops at the first that passes, and behind the random ones where the best is two standard errors short of the bar.
    """
    points: list[Unit] = []
    scores: list[float] = []
    while True:
        if len(points) < len(first):
            points.append(first[len(points)])
        else:
            points.append(suggest(points, scores, len(points) < RANDOM, seed=seed + len(points)))
        scores.append(trials(Curve.at(keep, points[-1]).rates(layers)).score)
        best = max(range(len(points)), key=scores.__getitem__)
        curve = Curve.at(keep, points[best])
        hopeless = trials(curve.rates(layers)).score + 2 * trials(curve.rates(layers)).error < trials.bar
        if trials.passes(curve.rates(layers)) or len(points) >= (RANDOM if hopeless else RANDOM + GUIDED):
            return curve, points[best]


def least_curve(trials: Trials, layers: int, seed: int, budgets: Sequence[float] = BUDGETS) -> Curve | None:
    """The curve that passes with the least mean, among `budgets` (ascending), or None; found by bisection.

    The flattest curve is asked first, and in front of it one that passed at a higher budget.
    """
    failed, passed, found = -1, len(budgets), None
    first = [FLAT]
    while passed - failed > 1:
        middle = (failed + passed) // 2
        curve, point = best_curve(trials, layers, budgets[middle], seed, first)
        if trials.passes(curve.rates(layers)):
            passed, found, first = middle, curve, list(dict.fromkeys([point, FLAT]))
        else:
            failed = middle
    if found is not None and passed + 1 < len(budgets):
        trials(Curve.at(budgets[passed + 1], first[0]).rates(layers))  # a contradiction, if it fails
    return found
