"""The policies of `foveate calibrate`, each a family of budgets from the safest down, and how each budget is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from foveate.asking.mistake import Mistake, one_line
from foveate.asking.variant import Variant
from foveate.methods.base import Method
from foveate.methods.mass import by_mass

from .calibrate_questions import Asked, Column, Said
from .calibrate_report import Found, Point
from .guarantees import Rule
from .losses import Loss

SURE = (0.999, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.25, 0.0)
"""What a cascade may demand of its least sure token, from the safest on."""


class Judge:
    """Whether what was said under a budget passes, in every group.

    whole: what the untouched model says. seconds: it took.
    """

    def __init__(self, whole: Column, loss: Loss, rule: Rule, groups: dict[str, list[int]]) -> None:
        self.whole, self.loss, self.rule, self.groups = whole, loss, rule, groups
        self.seconds = sum(said.seconds for said in whole if said)

    def losses(self, column: Column) -> np.ndarray:
        """(n,) of each question, 0 where it was not asked."""
        pairs = zip(column, self.whole, strict=True)
        return np.array([self.loss(said.text, whole.text) if said and whole else 0.0 for said, whole in pairs])

    def sums(self, losses: np.ndarray) -> dict[str, tuple[int, float, float]]:
        """Of each group the number of its questions, their losses together, and p."""
        found = {}
        for name, group in self.groups.items():
            total = float(losses[group].sum())
            found[name] = len(group), total, float(self.rule.p(total, len(group)))
        return found

    def passes(self, losses: np.ndarray) -> bool:
        """Whether the losses are few enough in every group; where some are missing, whether they still may be."""
        return all(self.rule.passes(total, n) for n, total, _ in self.sums(losses).values())

    def point(self, at: float, column: Column, losses: np.ndarray, kept: float) -> Point:
        """What is said of one budget."""
        asked = [said for said in column if said]
        passes = len(asked) == len(column) and self.passes(losses)
        return Point(at, len(asked), kept, sum(s.seconds for s in asked), passes, self.sums(losses))


def descend(asked: Asked, variant: Variant, steps: Sequence[float], judge: Judge, *, mass: bool) -> Found:
    """One budget for all, or one mass, from the largest down until one fails; a failing one is not asked to its end."""
    points, worst = [], np.zeros(len(asked))
    for step in steps:
        method = by_mass(variant.method, step) if mass else _at(variant.method, step)

        def counted(column: Column, worst: np.ndarray = worst) -> np.ndarray:
            losses = judge.losses(column)
            return np.maximum(worst, losses) if judge.rule.kind == "conformal" else losses

        column = asked.ask(method, lambda column: not judge.passes(counted(column)))
        worst = counted(column)
        points.append(judge.point(step, column, worst, _mean([said.kept for said in column if said])))
        if not points[-1].certified:
            break
    seconds = sum(point.seconds for point in points)
    return Found(variant.label, "mass" if mass else "fixed", variant.method, points, (), seconds)


def cascade(asked: Asked, variant: Variant, steps: Sequence[float], judge: Judge) -> Found:
    """Ask with the fewest tokens first, and again with more where the model is not sure enough, untouched at last.

    Every demand on how sure it must be is judged on the same answers.
    """
    rungs = sorted(steps)
    columns = [[said for said in asked.ask(_at(variant.method, keep)) if said] for keep in rungs]
    points, worst = [], np.zeros(len(asked))
    for demand in SURE:
        column, kept = climb(columns, judge.whole, demand)
        losses = judge.losses(column)
        worst = np.maximum(worst, losses) if judge.rule.kind == "conformal" else losses
        points.append(judge.point(demand, column, worst, float(kept.mean())))
        if not points[-1].certified:
            break
    seconds = sum(said.seconds for column in columns for said in column)
    return Found(variant.label, "cascade", variant.method, points, tuple(rungs), seconds)


def climb(columns: Sequence[Sequence[Said]], whole: Column, demand: float) -> tuple[list[Said], np.ndarray]:
    """What a cascade says, and (n,) the share of tokens that it read for that, all its tries together.

    columns: what is said on each rung, that with the fewest tokens first. demand: how sure an answer must be.
    """
    said, kept = [], []
    for index, last in enumerate(whole):
        assert last is not None
        tries = [column[index] for column in columns]
        stop = next((number for number, one in enumerate(tries) if one.sure >= demand), len(tries))
        ladder = [*tries, last]
        said.append(ladder[stop])
        kept.append(sum(one.kept for one in ladder[: stop + 1]))
    return said, np.array(kept)


def _at(method: Method, keep: float) -> Method:
    try:
        return dataclasses.replace(method, keep=keep)
    except ValueError as error:
        raise Mistake(f"{method.name}: {one_line(error)}") from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
