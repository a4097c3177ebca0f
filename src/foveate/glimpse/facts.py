"""What can be asked about scenes, and the one right answer to each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from foveate.glimpse.scene import COLUMNS, ROWS, SHAPES, SPRITES, Scene, place

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
    "list": ("List all things row by row.", "What is in each row?", "List what you see row by row."),
    "line": ("Read the line.", "What does the line say?", "What is printed in the line?"),
    "compare": ("Compare the {} and the {}.", "Is the same at the {} and the {}?"),
    "which": ("Which picture shows {}?", "In which picture is {}?", "Which of the pictures shows {}?"),
    "each": ("What is at the {} of each picture?", "What do you see at the {} of each picture?"),
}
ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Fact:
    """A question with one right answer. kind: one of `world.KINDS`. before: earlier turns, each asked and answered.

    subject: what the question is about, "" where that is the whole picture.
    """

    kind: str
    question: str
    subject: str
    answer: str
    before: tuple[tuple[str, str], ...] = ()


def plural(name: str) -> str:
    """More than one of a sprite or shape."""
    return name + ("es" if name.endswith(("s", "x")) else "s")


def facts(scene: Scene, rng: np.random.Generator) -> Iterator[Fact]:
    """What can be asked about one scene in one question; the last one is the description of it all."""
    names = [thing.name for thing in scene.things]
    kinds = [thing.kind for thing in scene.things]
    countable = [kind for kind in kinds if kind in SPRITES or kind in SHAPES]

    for thing in scene.things:
        if thing.kind != "line":  # a line has no cell of its own
            yield _ask(rng, "what", thing.place, thing.name)
        if kinds.count(thing.kind) == 1:
            yield _ask(rng, "where", thing.kind, thing.place)
        elif names.count(thing.name) == 1:
            yield _ask(rng, "where", thing.name, thing.place)
        if thing.kind in SHAPES and kinds.count(thing.kind) == 1:
            yield _ask(rng, "colour", thing.kind, thing.detail)
        if thing.kind in ("number", "word", "line"):
            yield _ask(rng, thing.kind, "", thing.detail)
    if empty := _empty(scene):
        yield _ask(rng, "what", place(int(rng.choice(empty))), "nothing")
    for kind in dict.fromkeys(countable):
        yield _ask(rng, "exists", kind, "yes", with_article(kind))
        other = _absent(kinds, rng)
        yield _ask(rng, "exists", other, "no", with_article(other))
        yield _ask(rng, "count", kind, str(kinds.count(kind)), plural(kind))
    stranger = _absent(kinds, rng)
    yield _ask(rng, "count", stranger, "0", plural(stranger))
    yield _ask(rng, "total", "", str(len(scene.things)))
    yield _compare(scene, rng)
    yield _ask(rng, "list", "", _row_by_row(scene))
    yield _ask(rng, "describe", "", ", ".join(f"{thing.name} {thing.place}" for thing in scene.things))


def pairs(found: Sequence[Fact], rng: np.random.Generator) -> Iterator[Fact]:
    """Two short questions in one turn ("both"), and one turn after the other ("again")."""
    short = [fact for fact in found if fact.kind not in ("describe", "list", "compare")]
    for kind in ("both", "again"):
        first = short[rng.integers(len(short))]
        others = [fact for fact in short if fact.kind != first.kind]
        second = others[rng.integers(len(others))]
        subject = f"{first.subject}, {second.subject}"
        if kind == "both":
            question, answer = f"{first.question} {second.question}", f"{first.answer}. {second.answer}"
            yield Fact(kind, question, subject, answer)
        else:
            yield Fact(kind, second.question, subject, second.answer, ((first.question, first.answer),))


def across(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[Fact]:
    """What can be asked about two or three scenes that are seen together."""
    kinds = [[thing.kind for thing in scene.things] for scene in scenes]
    every = [kind for own in kinds for kind in own]
    for index, own in enumerate(kinds):
        for kind in dict.fromkeys(own):
            if all(kind not in other for other in kinds[:index] + kinds[index + 1 :]):
                yield _ask(rng, "which", kind, ORDINALS[index], with_article(kind))
    stranger = _absent(every, rng)
    yield _ask(rng, "which", stranger, "none", with_article(stranger))
    lines = {thing.cell // 3 for scene in scenes for thing in scene.things if thing.kind == "line"}
    cells = [cell for cell in range(9) if cell // 3 not in lines]
    weights = np.array([1.0 + 4 * sum(_at(scene, cell) != "nothing" for scene in scenes) for cell in cells])
    for cell in rng.permutation(cells) if cells else ():
        if rng.random() < weights[cells.index(cell)] / weights.max():
            yield _ask(rng, "each", place(int(cell)), ", ".join(_at(scene, int(cell)) for scene in scenes))


def _ask(rng: np.random.Generator, kind: str, subject: str, answer: str, shown: str | None = None) -> Fact:
    template = ASK[kind][rng.integers(len(ASK[kind]))]
    return Fact(kind, template.format(subject if shown is None else shown), subject, answer)


def _at(scene: Scene, cell: int) -> str:
    return next((thing.name for thing in scene.things if thing.cell == cell), "nothing")


def _empty(scene: Scene) -> list[int]:
    """Cells in which nothing lies, not even a part of a line."""
    lines = {thing.cell // 3 for thing in scene.things if thing.kind == "line"}
    taken = {thing.cell for thing in scene.things}
    return [cell for cell in range(9) if cell not in taken and cell // 3 not in lines]


def _compare(scene: Scene, rng: np.random.Generator) -> Fact:
    """Two places, one of them or both with something there; half of the time alike ones where there are any."""
    filled = [thing.cell for thing in scene.things if thing.kind != "line"]
    cells = [*filled, *_empty(scene)]
    first = int(rng.choice(filled or cells))
    alike = [cell for cell in filled if cell != first and _at(scene, cell) == _at(scene, first)]
    others = alike if alike and rng.random() < 0.5 else [cell for cell in filled if cell != first]
    if not others or rng.random() < 0.15:
        others = [cell for cell in cells if cell != first]
    second = int(rng.choice(others))
    one, two = _at(scene, first), _at(scene, second)
    verdict = "same" if one == two else "different"
    subject = f"{place(first)}, {place(second)}"
    template = ASK["compare"][rng.integers(len(ASK["compare"]))]
    question = template.format(place(first), place(second))
    return Fact("compare", question, subject, f"{one} and {two}, {verdict}")


def _row_by_row(scene: Scene) -> str:
    lines = []
    for index, row in enumerate(ROWS):
        here = [
            thing.name if thing.kind == "line" else f"{thing.name} {COLUMNS[thing.cell % 3]}"
            for thing in scene.things
            if thing.cell // 3 == index
        ]
        lines.append(f"{row}: {', '.join(here) or 'nothing'}")
    return ". ".join(lines)


def _absent(kinds: Sequence[str], rng: np.random.Generator) -> str:
    while True:
        options = list(SPRITES) if rng.random() < 0.85 else list(SHAPES)
        kind = str(rng.choice(options))
        if kind not in kinds:
            return kind


def with_article(name: str) -> str:
    """As in "a dog", "an owl"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
