"""Scores of answers, and what they are worth beside trivial baselines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from foveate.glimpse.happenings import CLIP_KINDS
from foveate.glimpse.world import KINDS, Question


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are the same words, whatever their case, spacing and final full stop."""
    return _normal(prediction) == _normal(answer)


def holds(prediction: str, answer: str) -> bool:
    """Whether the words of `answer` stand together in what was said."""
    return f" {words(answer)} " in f" {words(prediction)} "


def score(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Share of exact matches for each kind of question, and for "all" of them."""
    hits: dict[str, list[bool]] = {}
    for prediction, question in zip(predictions, questions, strict=True):
        hit = exact_match(prediction, question.answer)
        for group in (question.kind, "all"):
            hits.setdefault(group, []).append(hit)
    kinds = dict.fromkeys([*KINDS, *CLIP_KINDS, "all"])  # some are kinds of both worlds
    return {kind: float(np.mean(hits[kind])) for kind in kinds if kind in hits}


def majority(questions: Sequence[Question]) -> list[str]:
    """The baseline that gives each kind of question its most frequent answer, knowing the answers."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def blind(questions: Sequence[Question]) -> list[tuple[Image.Image, ...]]:
    """For each question the pictures of the next question of its kind: what is still right was guessed."""
    by_kind: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_kind.setdefault(question.kind, []).append(index)
    successor = {
        own: other for group in by_kind.values() for own, other in zip(group, group[1:] + group[:1], strict=True)
    }
    return [questions[successor[index]].images for index in range(len(questions))]


def interval(hits: Sequence[int], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval, over questions, of the mean: the share of hits, or a difference of two."""
    values = np.asarray(hits, np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def words(text: str) -> str:
    """The words of a text in lower case, with a space between them."""
    # A minus stays with its number; a dash between two is none.
    return " ".join(re.findall(r"(?:(?<!\w)-(?=\d))?\w+", text.lower().replace("\u2212", "-")))


def _normal(text: str) -> str:
    return " ".join(text.lower().rstrip(". ").replace(" ,", ",").split())
