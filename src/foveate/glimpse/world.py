"""The small world that glimpse knows: pictures of a few things, and questions with exactly one right answer.

What lies in a picture is in `scene`, how it is painted in `drawing`, what can be asked about it in `facts`. Everything
follows from a seed, so a picture and its questions can be drawn again anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveate.glimpse.drawing import render
from foveate.glimpse.facts import Fact, across, facts, pairs
from foveate.glimpse.scene import Scene, imagine

KINDS = (
    "what", "where", "exists", "count", "total", "colour", "number", "word", "describe",
    "list", "line", "compare", "both", "again", "which", "each",
)  # fmt: skip
"""Kinds of questions.

what: what lies at a place. where: the place of a thing. exists: is there such a thing. count: how many of a kind.
total: how many things. colour: of a shape. number, word: what is printed. describe: everything with its place. With
answers that need the picture while they are written: list: everything, row by row; line: a line of words and numbers;
compare: two places; both: two questions in one turn; again: a question in a second turn. About two or three pictures:
which: the picture with a thing; each: what lies at a place of each.
"""


@dataclass(frozen=True)
class Question:
    """Pictures, a question about them, its one right answer, and the kind of question (one of `KINDS`).

    before: earlier turns about the same pictures, each a question and its right answer.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    before: tuple[tuple[str, str], ...] = ()

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]


def question(seed: int, kind: str) -> Question:
    """The first question of one kind that pictures from this seed, or the next that have any, allow."""
    rng = np.random.default_rng(seed)
    while True:
        several = kind in ("which", "each")
        scenes = [imagine(rng) for _ in range(rng.integers(2, 4) if several else 1)]
        found = [fact for fact in _asked(scenes, rng) if fact.kind == kind]
        if kind == "what" and rng.random() < 0.9:  # few questions about empty places
            found = [fact for fact in found if fact.answer != "nothing"] or found
        if kind == "count":  # several of a kind are rare, and the interesting case
            many = [fact for fact in found if fact.answer > "1"]
            found = many or (found if rng.random() < 0.5 else [])
        if found:
            fact = found[rng.integers(len(found))]
            return Question(tuple(render(scene) for scene in scenes), fact.question, fact.answer, kind, fact.before)


def _asked(scenes: list[Scene], rng: np.random.Generator) -> list[Fact]:
    if len(scenes) > 1:
        return list(across(scenes, rng))
    found = list(facts(scenes[0], rng))
    return [*found, *pairs(found, rng)]
