"""The small world that glimpse knows: pictures of a few things, and questions with exactly one right answer.

What lies in a picture is in `scene`, how it is painted in `drawing`. Everything follows from a seed, so a picture
and its questions can be drawn again anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveate.glimpse.drawing import ATLAS, ATLAS_COLUMNS, SPRITE, coverage, render
from foveate.glimpse.scene import (
    COLOURS,
    COLUMNS,
    PATCH,
    PRINT,
    ROWS,
    SHAPES,
    SIZE,
    SPRITES,
    WORDS,
    Scene,
    Thing,
    imagine,
    place,
)

__all__ = [
    "ASK",
    "ATLAS",
    "ATLAS_COLUMNS",
    "COLOURS",
    "COLUMNS",
    "KINDS",
    "PATCH",
    "PRINT",
    "ROWS",
    "SHAPES",
    "SIZE",
    "SPRITE",
    "SPRITES",
    "WORDS",
    "Question",
    "Scene",
    "Thing",
    "coverage",
    "facts",
    "imagine",
    "place",
    "plural",
    "question",
    "render",
]

KINDS = ("what", "where", "exists", "count", "total", "colour", "number", "word", "describe")

ASK = {
    "what": (
        "What is at the {}?",
        "What do you see at the {}?",
        "What can be seen at the {}?",
        "What is in the {}?",
    ),
    "where": ("Where is the {}?", "Where do you see the {}?", "Where in the picture is the {}?"),
    "exists": ("Is there {}?", "Do you see {}?", "Does the picture show {}?", "Is there {} in the picture?"),
    "count": (
        "How many {} are there?",
        "How many {} do you see?",
        "How many {} are in the picture?",
        "Count the {}.",
    ),
    "total": (
        "How many things are there?",
        "How many things do you see?",
        "How many things are in the picture?",
        "Count all things.",
    ),
    "colour": ("What colour is the {}?", "Which colour does the {} have?", "What color is the {}?"),
    "number": (
        "What number is printed?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
    ),
    "word": ("What word is printed?", "Which word do you see?", "Read the word.", "What does it say?"),
    "describe": (
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "What does the picture show?",
    ),
}


@dataclass(frozen=True)
class Question:
    """A picture, a question about it, its one right answer, and the kind of question (one of `KINDS`)."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def plural(name: str) -> str:
    """More than one of a sprite or shape."""
    return name + ("es" if name.endswith(("s", "x")) else "s")


def facts(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str, str]]:
    """The questions that have one right answer in this scene, as `(kind, question, subject, answer)`.

    `subject` is what the question is about ("" where that is the whole picture).
    """
    names = [thing.name for thing in scene.things]
    kinds = [thing.kind for thing in scene.things]
    countable = [kind for kind in kinds if kind in SPRITES or kind in SHAPES]

    def ask(kind: str, subject: str, answer: str, shown: str | None = None) -> tuple[str, str, str, str]:
        template = ASK[kind][rng.integers(len(ASK[kind]))]
        return kind, template.format(subject if shown is None else shown), subject, answer

    for thing in scene.things:
        yield ask("what", thing.place, thing.name)
        if kinds.count(thing.kind) == 1:
            yield ask("where", thing.kind, thing.place)
        elif names.count(thing.name) == 1:
            yield ask("where", thing.name, thing.place)
        if thing.kind in SHAPES and kinds.count(thing.kind) == 1:
            yield ask("colour", thing.kind, thing.detail)
        if thing.kind in ("number", "word"):
            yield ask(thing.kind, "", thing.detail)
    empty = sorted(set(range(9)) - {thing.cell for thing in scene.things})
    yield ask("what", place(int(rng.choice(empty))), "nothing")
    for kind in dict.fromkeys(countable):
        yield ask("exists", kind, "yes", shown=_with_article(kind))
        other = _absent(kinds, rng)
        yield ask("exists", other, "no", shown=_with_article(other))
        yield ask("count", kind, str(kinds.count(kind)), shown=plural(kind))
    stranger = _absent(kinds, rng)
    yield ask("count", stranger, "0", shown=plural(stranger))
    yield ask("total", "", str(len(scene.things)))
    yield ask("describe", "", ", ".join(f"{thing.name} {thing.place}" for thing in scene.things))


def question(seed: int, kind: str) -> Question:
    """The first question of one kind that a picture from this seed, or the next that has any, allows."""
    rng = np.random.default_rng(seed)
    while True:
        scene = imagine(rng)
        found = [fact for fact in facts(scene, rng) if fact[0] == kind]
        if kind == "what" and len(found) > 1 and rng.random() < 0.9:
            found.pop()  # the last one is about an empty place
        if kind == "count":  # several of a kind are rare, and the interesting case
            several = [fact for fact in found if fact[3] > "1"]
            found = several or (found if rng.random() < 0.5 else [])
        if found:
            _, text, _, answer = found[rng.integers(len(found))]
            return Question(render(scene), text, answer, kind)


def _absent(kinds: list[str], rng: np.random.Generator) -> str:
    while True:
        options = list(SPRITES) if rng.random() < 0.85 else list(SHAPES)
        kind = str(rng.choice(options))
        if kind not in kinds:
            return kind


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
