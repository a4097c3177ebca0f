"""The searches for schedules, on functions whose best schedule is known."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.evaluation import bayes
from foveate.evaluation.bayes import improvement, matern, posterior, suggest
from foveate.evaluation.rankings import kendall
from foveate.evaluation.schedules import (
    BUDGETS,
    GUIDED,
    RANDOM,
    Curve,
    Trial,
    Trials,
    best_curve,
    greedy,
    least_curve,
    neighbours,
    settle,
)
from foveate.methods.psigmoid import PSigmoid

few = settings(max_examples=60, deadline=None)
GRID = (0.125, 0.25, 0.375, 0.5, 0.75)
on_grid = st.lists(st.sampled_from((*GRID, 1.0)), min_size=1, max_size=6).map(lambda x: tuple(sorted(x, reverse=True)))


def short_of(needs, error=0.0):
    """Scores 1 where every layer has what it needs, and less the more they lack: monotone."""

    def ask(rates):
        lack = sum(max(0.0, need - rate) for need, rate in zip(needs, rates, strict=True))
        return Trial(1 - lack, error)

    return ask


def schedules(grid, layers):
    return [tuple(sorted(each, reverse=True)) for each in combinations_with_replacement(grid, layers)]


# G-Search ----------------------------------------------------------------------------------------------------


@few
@given(on_grid)
def test_a_monotone_score_is_searched_to_its_optimum(needs):
    trials = Trials(short_of(needs), 1.0)
    found = greedy(trials, len(needs), GRID)
    assert found == needs
    assert len(trials.asked) <= len(needs) * math.ceil(math.log2(len(GRID) + 1)), "by bisection"
    assert settle(trials, found, GRID) == needs and not trials.contradictions()


@few
@given(on_grid, st.floats(0, 0.3))
def test_no_schedule_of_the_grid_with_less_in_every_layer_passes(needs, tolerance):
    """Against all there are, also where a loss is allowed and several schedules are as good."""
    layers = min(len(needs), 4)
    trials = Trials(short_of(needs[:layers]), 1 - tolerance)
    found = settle(trials, greedy(trials, layers, GRID), GRID)
    assert trials.passes(found)
    for other in schedules((*GRID, 1.0), layers):
        if other != found and all(a <= b for a, b in zip(other, found, strict=True)):
            assert not trials.passes(other)


def test_a_score_that_is_not_monotone_is_noticed_and_used():
    """In the last layer 0.125 passes and what is above it fails: bisection alone stops above."""

    def ask(rates):
        bad = rates[0] < 0.75 or rates[1] in (0.25, 0.375, 0.5)
        return Trial(0.94 if bad else 0.96, 0.015)

    certain = Trials(lambda rates: Trial(ask(rates).score, 0.0), 0.95)
    assert greedy(certain, 2, GRID) == (0.75, 0.75)
    doubtful = Trials(ask, 0.95)
    found = settle(doubtful, greedy(doubtful, 2, GRID), GRID)
    assert found == (0.75, 0.125)
    assert ((0.75, 0.25), (0.75, 0.125)) in doubtful.contradictions()


def test_verifying_neighbours_mends_what_bisection_missed():
    def ask(rates):
        return Trial(1.0 if rates in ((0.75, 0.75), (0.75, 0.5), (0.75, 0.375), (0.5, 0.375)) else 0.0, 0.0)

    trials = Trials(ask, 0.5)
    assert settle(trials, (0.75, 0.75), GRID) == (0.5, 0.375)
    assert trials.contradictions(), "the neighbours above were asked, too"


def test_where_nothing_passes_all_stay_and_where_all_pass_the_least_is_taken():
    assert greedy(Trials(lambda rates: Trial(0.0, 0.0), 0.5), 3, GRID) == (1.0, 1.0, 1.0)
    everything = Trials(lambda rates: Trial(1.0, 0.0), 0.5)
    assert settle(everything, greedy(everything, 3, GRID), GRID) == (0.125,) * 3


def test_no_layer_but_the_first_may_see_nothing():
    trials = Trials(lambda rates: Trial(1.0, 0.0), 0.5)
    assert settle(trials, greedy(trials, 3, (0.0, 0.25)), (0.0, 0.25)) == (0.25, 0.0, 0.0)
    assert all(any(rates) for rates in trials.asked)


@few
@given(on_grid)
def test_neighbours_are_one_step_away(rates):
    values = [*GRID, 1.0]
    for step in (-1, 1):
        slow = set()
        for layer in range(len(rates)):
            at = values.index(rates[layer]) + step
            if 0 <= at < len(values):
                changed = list(rates)
                changed[layer] = values[at]
                for i in range(len(rates)):
                    if step < 0 and i > layer:
                        changed[i] = min(changed[i], values[at])
                    if step > 0 and i < layer:
                        changed[i] = max(changed[i], values[at])
                slow.add(tuple(changed))
        found = list(neighbours(rates, GRID, step))
        assert set(found) == slow - {rates} and len(found) == len(set(found))
        assert all(list(each) == sorted(each, reverse=True) for each in found)


def test_a_schedule_is_asked_once():
    asked = []

    def ask(rates):
        asked.append(rates)
        return Trial(0.5, 0.1)

    trials = Trials(ask, 0.5)
    assert trials([1.0, 0.5]) == trials((1.0, 0.5)) and trials.passes((1.0, 0.5)) and asked == [(1.0, 0.5)]
    assert trials.doubtful((1.0, 0.5)) and not Trials(lambda rates: Trial(0.3, 0.1), 0.5).doubtful((1.0,))


def test_contradictions_are_all_there_are():
    scores = {rates: score for rates, score in zip(schedules(GRID[:3], 2), (0.9, 0.1, 0.9, 0.9, 0.1, 0.9), strict=True)}
    trials = Trials(lambda rates: Trial(scores[rates], 0.0), 0.5)
    for rates in scores:
        trials(rates)
    slow = [
        (more, less)
        for more, less in product(scores, repeat=2)
        if scores[more] < 0.5 <= scores[less] and more[0] >= less[0] and more[1] >= less[1]
    ]
    assert sorted(trials.contradictions()) == sorted(slow) and slow


# P-Sigmoid ---------------------------------------------------------------------------------------------------


def test_a_point_of_the_square_is_a_curve_of_the_method():
    for point in ((0.0, 0.0), (0.3, 0.7), (1.0, 1.0)):
        curve = Curve.at(0.4, point)
        method = PSigmoid(keep=curve.keep, steepness=curve.steepness, floor=curve.floor)
        assert curve.rates(7) == method.rates_at(8)
    assert Curve.at(0.4, (0.0, 0.0)).steepness == 2 and Curve.at(0.4, (1.0, 0.0)).steepness == 60


@pytest.mark.parametrize("budget", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("point", [(0.2, 0.0), (0.7, 0.2), (0.1, 0.9)])
def test_the_least_budget_is_found(budget, point):
    """What is needed is a curve of the family itself; a little less of it in every layer is allowed."""
    needs = Curve.at(budget, point).rates(7)
    trials = Trials(short_of(needs, error=0.02), 0.8)
    curve = least_curve(trials, 7, seed=0)
    assert curve is not None and trials.passes(curve.rates(7))
    assert budget - 0.8 / 7 <= curve.keep <= budget + 0.051
    again = Trials(short_of(needs, error=0.02), 0.8)
    assert least_curve(again, 7, seed=0) == curve and again.asked == trials.asked, "seeded"


def test_no_budget_may_pass_and_all_may():
    assert least_curve(Trials(lambda rates: Trial(0.0, 0.0), 0.5), 5, seed=0) is None
    found = least_curve(Trials(lambda rates: Trial(1.0, 0.0), 0.5), 5, seed=0)
    assert found is not None and found.keep == BUDGETS[0]


@pytest.mark.parametrize(("score", "asked"), [(0.9, 1), (0.49, RANDOM + GUIDED), (0.1, RANDOM)])
def test_a_budget_is_given_up_when_it_is_hopeless(score, asked):
    trials = Trials(lambda rates: Trial(score, 0.01), 0.5)
    best_curve(trials, 5, 0.5, seed=0)
    assert len(trials.asked) == asked


# Bayesian optimisation ---------------------------------------------------------------------------------------


def test_the_process_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    points, at, scores = rng.random((6, 2)), rng.random((4, 2)), rng.normal(size=6)

    def kernel(a, b, length=0.4):
        r = math.dist(a, b) / length
        return (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)

    inner = np.array([[kernel(a, b) for b in points] for a in points])
    cross = np.array([[kernel(a, b) for b in points] for a in at])
    assert np.allclose(matern(at, points, 0.4), cross)
    known = inner + bayes.NOISE * np.eye(6)
    mean, deviation, likelihood = posterior(points, scores, at, 0.4)
    assert np.allclose(mean, cross @ np.linalg.inv(known) @ scores)
    assert np.allclose(deviation**2, [1 - row @ np.linalg.inv(known) @ row for row in cross])
    slow = -0.5 * scores @ np.linalg.inv(known) @ scores - 0.5 * math.log(np.linalg.det(known))
    assert likelihood == pytest.approx(slow)


def test_expected_improvement_is_an_expectation():
    drawn = np.random.default_rng(0).normal(size=400_000)
    for mean, deviation, best in ((0.0, 1.0, 0.5), (1.0, 0.5, 0.0), (-1.0, 2.0, 1.0)):
        slow = np.maximum(mean + deviation * drawn - best, 0).mean()
        assert improvement(np.array([mean]), np.array([deviation]), best)[0] == pytest.approx(slow, rel=0.02)


def test_suggestions_come_closer_than_chance():
    def hill(point):
        return -((point[0] - 0.7) ** 2) - (point[1] - 0.2) ** 2

    def best(blind):
        reached = []
        for seed in range(5):
            points, scores = [], []
            for turn in range(24):
                points.append(suggest(points, scores, blind or turn < 8, seed=100 * seed + turn))
                scores.append(hill(points[-1]))
            reached.append(max(scores))
        return float(np.mean(reached))

    assert best(False) > -0.001 > best(True)


# Rankings ----------------------------------------------------------------------------------------------------


def slow_tau(one, other):
    """Kendall's tau-b by its definition: over all pairs, ties counted apart."""
    agree = ties_one = ties_other = pairs = 0
    for i in range(len(one)):
        for j in range(i):
            a, b = np.sign(one[i] - one[j]), np.sign(other[i] - other[j])
            agree, pairs = agree + a * b, pairs + 1
            ties_one, ties_other = ties_one + (a == 0), ties_other + (b == 0)
    return agree / math.sqrt((pairs - ties_one) * (pairs - ties_other))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize("ties", [False, True])
def test_kendall_counts_pairs(chunk, ties):
    scores = torch.randn(4, 15, generator=torch.Generator().manual_seed(0))
    scores = scores.round() if ties else scores
    fast = kendall(scores, chunk)
    for i, j in product(range(4), repeat=2):
        assert float(fast[i, j]) == pytest.approx(slow_tau(scores[i].tolist(), scores[j].tolist()))
    assert kendall(torch.stack([scores[0], -scores[0]]))[0, 1] == pytest.approx(-1)
