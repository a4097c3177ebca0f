"""What can be asked about a clip, the one right answer to each question, and what shows less than the right clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from foveate.glimpse.clips import FRAMES, SPRITES, Clip, Track, imagine
from foveate.glimpse.facts import Fact, with_article
from foveate.glimpse.scene import SHAPES
from foveate.glimpse.world import Question

ASK = {
    "direction": (
        "Which way does the {} move?",
        "Which way does the {} go?",
        "In which direction does the {} move?",
    ),
    "at_start": (
        "Where is the {} at the start?",
        "Where is the {} in the first picture?",
        "Where does the {} start?",
    ),
    "at_end": (
        "Where is the {} at the end?",
        "Where is the {} in the last picture?",
        "Where does the {} end?",
    ),
    "happens": ("What happens to the {}?", "What does the {} do?", "What becomes of the {}?"),
    "appears": ("What appears?", "What comes into the picture?", "What is new at the end?"),
    "disappears": ("What disappears?", "What goes away?", "What is gone at the end?"),
    "moves_count": ("How many things move?", "How many things are moving?", "Count the things that move."),
    "first": (
        "Which changes first, the {} or the {}?",
        "What changes first, the {} or the {}?",
        "What is the first to change, the {} or the {}?",
    ),
    "colour_end": (
        "What colour is the {} at the end?",
        "Which colour does the {} have at the end?",
        "What color is the {} in the last picture?",
    ),
    "exists": ("Is there {}?", "Do you see {}?", "Does the clip show {}?"),
    "where": ("Where is the {}?", "Where do you see the {}?", "Where does the {} stay?"),
    "describe": ("Describe the clip.", "What happens in the clip?", "What does the clip show?", "What happens?"),
}
CLIP_KINDS = tuple(ASK)
"""Kinds of questions about a clip.

direction: where a thing moves. at_start, at_end: its place in the first and the last frame. happens: what happens to a
thing. appears, disappears: what is new, what is gone. moves_count: how many things move. first: which of two things
changes first. colour_end: the colour of a shape in the last frame. describe: everything, with its place and what
happens to it. Any frame answers the others: exists: is there such a thing; where: the place of a thing that stays.
"""
STILL = ("exists", "where")
"""Kinds that any frame of the clip answers."""
DULL = 0.2  # share of questions that are asked about what does not change, or is answered with nothing


def happenings(clip: Clip, rng: np.random.Generator) -> Iterator[Fact]:
    """What can be asked about one clip; the last one is its description. Few are about what does not change."""
    for track in clip.tracks:
        yield from _about(track, rng)
    for kind in ("appears", "disappears"):
        names = [track.seen[0].name for track in clip.tracks if track.happening == kind]
        if len(names) == 1 or (not names and _sometimes(rng)):
            yield _ask(rng, kind, "", *names or ["nothing"])
    movers = sum(track.direction != "nowhere" for track in clip.tracks)
    yield _ask(rng, "moves_count", "", str(movers))
    changing = [track for track in clip.tracks if track.when is not None]
    for one, two in pairwise(changing):
        if one.when != two.when:
            first, second = (one, two) if rng.random() < 0.5 else (two, one)
            earlier = min(one, two, key=lambda track: track.when or 0)
            yield _ask(rng, "first", f"{first.kind}, {second.kind}", earlier.kind, first.kind, second.kind)
    absent = [kind for kind in (*SPRITES, *SHAPES) if all(track.kind != kind for track in clip.tracks)]
    other = str(rng.choice(absent))
    yield _ask(rng, "exists", other, "no", with_article(other))
    yield _ask(rng, "describe", "", ", ".join(_told(track) for track in clip.tracks))


def _about(track: Track, rng: np.random.Generator) -> Iterator[Fact]:
    """Questions about one thing."""
    kind, first, last, stays = track.kind, track.frames[0], track.frames[-1], track.happening == "nothing"
    moves = track.direction != "nowhere"
    if moves or (stays and _sometimes(rng)):
        yield _ask(rng, "direction", kind, track.direction)
    if first and (moves or _sometimes(rng)):
        yield _ask(rng, "at_start", kind, first.place)
    if last and (moves or _sometimes(rng)):
        yield _ask(rng, "at_end", kind, last.place)
    if not stays or _sometimes(rng):
        yield _ask(rng, "happens", kind, track.happening)
    if last and kind in SHAPES and ("turns" in track.happening or _sometimes(rng)):
        yield _ask(rng, "colour_end", kind, last.detail)
    if first and last:
        yield _ask(rng, "exists", kind, "yes", with_article(kind))
        if not moves:
            yield _ask(rng, "where", kind, last.place)


def _sometimes(rng: np.random.Generator) -> bool:
    return bool(rng.random() < DULL)


def _told(track: Track) -> str:
    """As in "dog top left moves right", "red circle middle center"."""
    begins = f"{track.seen[0].name} {track.seen[0].place}"
    return begins if track.happening == "nothing" else f"{begins} {track.happening}"


def _ask(rng: np.random.Generator, kind: str, subject: str, answer: str, *shown: str) -> Fact:
    template = ASK[kind][rng.integers(len(ASK[kind]))]
    return Fact(kind, template.format(*shown or (subject,)), subject, answer)


def clip_question(seed: int, kind: str, frames: int = FRAMES) -> Question:
    """The first question of one kind that clips from this seed, or the next that have any, allow."""
    rng = np.random.default_rng(seed)
    while True:
        clip = imagine(rng, frames)
        found = [fact for fact in happenings(clip, rng) if fact.kind == kind]
        if kind == "exists":  # there is one "no" a clip, and a "yes" for every thing that stays
            answer = "yes" if rng.random() < 0.5 else "no"
            found = [fact for fact in found if fact.answer == answer]
        if found:
            fact = found[rng.integers(len(found))]
            return Question(clip.pictures(), fact.question, fact.answer, kind)


def shuffled(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The questions, with their frames in another order each: what is left without time."""
    rng = np.random.default_rng(seed)
    found = []
    for question in questions:
        order = right = list(range(len(question.images)))
        while order == right:
            order = [int(index) for index in rng.permutation(right)]
        found.append(replace(question, images=tuple(question.images[index] for index in order)))
    return found


def backwards(questions: Sequence[Question]) -> list[Question]:
    """The questions, with their frames from the last to the first: who reads time now says the opposite."""
    return [replace(question, images=question.images[::-1]) for question in questions]


def frozen(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The questions, with one of their frames, drawn at random, in the place of all."""
    rng = np.random.default_rng(seed)
    drawn = [question.images[rng.integers(len(question.images))] for question in questions]
    return [
        replace(question, images=(image,) * len(question.images))
        for question, image in zip(questions, drawn, strict=True)
    ]
