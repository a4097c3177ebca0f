"""The statistics of foveate calibrate: against slow twins, and kept over thousands of synthetic calibrations."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from foveate.asking.mistake import Mistake
from foveate.evaluation.guarantees import Rule, binomial_p, evidence, hoeffding_bentkus_p, least_sample

RISK, ERROR, RUNS, N = 0.05, 0.1, 4000, 300


def slow_tail(errors, n, risk):
    return math.fsum(math.comb(n, e) * risk**e * (1 - risk) ** (n - e) for e in range(errors + 1))


def slow_bound(total, n, risk):
    mean = min(total / n, risk)
    gap = (mean * math.log(mean / risk) if mean else 0) + (1 - mean) * math.log((1 - mean) / (1 - risk))
    return min(1, math.exp(-n * gap), math.e * slow_tail(math.ceil(round(total, 9)), n, risk))


def chosen(passes):
    """How many steps of a fixed sequence pass. passes: bool (runs, steps)."""
    return np.logical_and.accumulate(passes, axis=1).sum(1)


def violations(passes, risks, allowed=RISK):
    """The share of runs in which something is certified whose true risk is too large."""
    wrong = np.append(np.asarray(risks) > allowed, False)
    reached = chosen(passes)
    return np.mean(
        [wrong[:count].any() for count in range(len(risks) + 1)] @ (reached == np.arange(len(risks) + 1)[:, None])
    )


def limit(error, runs=RUNS):
    return error + 3 * math.sqrt(error * (1 - error) / runs)


@pytest.mark.parametrize("n, risk", [(1, 0.5), (45, 0.05), (300, 0.05), (77, 0.2)])
def test_tails_are_exact(n, risk):
    errors = list(range(min(n, 40) + 1))
    assert binomial_p(errors, n, risk) == pytest.approx([slow_tail(e, n, risk) for e in errors], rel=1e-9)
    totals = [0, 0.1 + 0.2, 0.5, 1, n * risk / 2, n * risk, n * 0.9]
    assert hoeffding_bentkus_p(totals, n, risk) == pytest.approx([slow_bound(t, n, risk) for t in totals], rel=1e-9)


@pytest.mark.parametrize(
    "risk, error, most",
    [
        (0.05, 0.05, {58: -1, 59: 0, 100: 1, 150: 2, 200: 4, 300: 8, 500: 16, 1000: 38, 2000: 83}),
        (0.05, 0.1, {44: -1, 45: 0, 100: 1, 150: 3, 200: 5, 300: 9, 500: 18, 1000: 40, 2000: 87}),
        (0.1, 0.05, {59: 1, 200: 12, 300: 21}),
    ],
)
def test_so_many_errors_pass(risk, error, most):
    rule = Rule("binomial", risk, error)
    assert {n: rule.most(n) for n in most} == most


def test_so_many_questions_are_needed():
    assert [least_sample(0.05, 0.1), least_sample(0.05, 0.05), least_sample(0.05, None)] == [45, 59, 19]
    for rule in (Rule("binomial", 0.05, 0.1), Rule("hoeffding-bentkus", 0.05, 0.1), Rule("conformal", 0.05, None)):
        assert rule.passes(0, rule.needs) and not rule.passes(0, rule.needs - 1), rule
        n = rule.needs + 200
        passing = rule.passes(np.arange(n + 1), n).tolist()
        assert passing == sorted(passing, reverse=True), "curtailing: what failed cannot pass any more"


@pytest.mark.parametrize(
    "risks",
    [(0.0501, 0.0501, 0.0501), (0.01, 0.03, 0.06, 0.2), (0.02, 0.0501, 0.0, 0.3), (0.01, 0.02, 0.03, 0.04)],
    ids=["all just above", "rising", "not monotone", "all fine"],
)
def test_promises_are_broken_no_more_often_than_said(risks):
    rng = np.random.default_rng(0)
    losses = rng.random((RUNS, 1, N)) < np.asarray(risks)[:, None]  # the same questions at all budgets
    passes = Rule("binomial", RISK, ERROR).passes(losses.sum(2), N)
    broken = violations(passes, risks)
    assert broken <= limit(ERROR)
    if risks[0] == 0.0501:
        assert broken > 0.04, "the bound is nearly met where it is hardest, so that a laxer rule would be seen"
        assert violations(Rule("binomial", RISK, 3 * ERROR).passes(losses.sum(2), N), risks) > limit(ERROR)


def test_methods_share_the_error():
    rng, methods = np.random.default_rng(1), 5
    losses = rng.binomial(N, 0.0501, (RUNS, methods))
    shared = (Rule("binomial", RISK, ERROR / methods).passes(losses, N)).any(1).mean()
    alone = (Rule("binomial", RISK, ERROR).passes(losses, N)).any(1).mean()
    assert shared <= limit(ERROR) < alone, "choosing the best of five by the same questions breaks the promise"


def test_graded_losses_keep_the_promise():
    rng, risks = np.random.default_rng(2), (0.03, 0.0501)
    drawn = rng.beta(0.1, 0.1 / 0.0501 - 0.1, (RUNS, N))
    totals = np.stack([0.03 / 0.0501 * drawn.sum(1), drawn.sum(1)], 1)
    assert violations(Rule("hoeffding-bentkus", RISK, ERROR).passes(totals, N), risks) <= limit(ERROR)
    assert Rule("hoeffding-bentkus", RISK, ERROR).passes(totals[:, 0], N).mean() > 0.2, "it has power, too"


def test_conformal_control_holds_in_the_mean():
    rng, n, risks = np.random.default_rng(3), 60, np.linspace(0.0, 0.2, 21)
    losses = rng.random((RUNS, 1, n)) < risks[:, None]
    count = chosen(Rule("conformal", RISK, None).passes(losses.sum(2), n))
    risk = np.append(0.0, risks)[count]  # of what is chosen: the last that passes
    assert 0.02 < risk.mean() <= RISK
    assert (risk > RISK).mean() > ERROR, "a mean, and no confidence: it is the weaker promise"


def test_the_watch_is_the_slow_one():
    losses, risk = np.random.default_rng(4).random(40), 0.1
    for t in (1, 7, 40):
        wealth = 0.0
        for stake in (0.5, 1, 2.5, 5):
            for start in range(1, t + 1):
                factors = [1 + stake * (loss - risk) for loss in losses[start - 1 : t]]
                wealth += math.prod(factors) / (start * (start + 1)) / 4
        assert evidence(losses, risk)[t - 1] == pytest.approx(wealth + 1 / (t + 1))


def test_the_watch_seldom_cries_wolf_and_sees_a_change():
    rng = np.random.default_rng(5)
    fine = evidence(rng.random((RUNS, 500)) < RISK, RISK)
    assert (fine.max(1) >= 20).mean() <= limit(0.05)
    changed = np.concatenate([rng.random((400, 300)) < 0.02, rng.random((400, 200)) < 0.25], 1)
    seen = evidence(changed, RISK)
    assert (seen[:, :300].max(1) < 20).mean() > 0.95
    assert (seen.max(1) >= 20).mean() > 0.95


def test_without_scipy_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(Mistake, match=r'pip install "foveate\[calibrate\]"'):
        Rule("binomial", 0.05, 0.1).p(0, 1)
