"""Turns scenes of the world into training examples: a picture or a few, many questions in one sequence.

Every question sees the pictures and itself but no other question, and starts at the same position, so each one
looks to the model exactly as it does alone in a chat.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from model import ASSISTANT, BOS, EOS, IMAGE, PAD, USER
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from foveate.glimpse import scene as world
from foveate.glimpse.drawing import columns, coverage, render
from foveate.glimpse.facts import Fact, across, facts, pairs

GRID = world.SIZE // world.PATCH
TEXT = 208  # tokens of questions and answers an example
IGNORE = -100
# How often each kind is asked: more where it is learned late, or where few scenes have anything to ask about.
APPETITE = {
    "where": 1.5,
    "exists": 1.2,
    "count": 1.5,
    "several": 8.0,  # a count above one: without this, "one" is always the better guess
    "what": 1.2,
    "total": 3.0,
    "colour": 1.5,
    "number": 1.5,
    "word": 1.5,
    "list": 3.0,
    "line": 4.0,
    "compare": 3.0,
    "both": 3.0,
    "again": 3.0,
    "which": 2.0,
    "each": 1.0,
}
FIRST_SEED = 10_000_000  # everything below is held out
Key = tuple[int, int]


class Lessons(Dataset[dict[str, torch.Tensor]]):
    """Examples by number and how many pictures they have, each from its own seed.

    An example of p pictures holds `pixels` (p, 3, 168, 168) uint8; `ids`, `labels` and `turn` (n,) of the sequence
    behind the pictures; `patches` (p, 4, 144): vocabulary ids of what lies on each patch (thing, detail, row, column;
    -100: none); and `present` (p, names) of what is in each picture. `silent` examples have fuller pictures with more
    print, and no questions.
    """

    side = world.SIZE  # pixels of a picture

    def __init__(self, processor: LlavaProcessor, silent: bool = False) -> None:
        self.processor, self.silent = processor, silent

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of every token."""
        return self.processor.tokenizer.get_vocab()

    def prefix(self, pictures: int = 1) -> list[int]:
        """The tokens in front of every question."""
        return [self.ids[BOS], self.ids[USER], *[self.ids[IMAGE]] * (pictures * GRID**2)]

    @cached_property
    def names(self) -> list[str]:
        """What can lie on a patch."""
        return ["nothing", *world.SPRITES, *world.SHAPES, *world.PRINTED]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain words."""
        return self.processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        number, pictures = key
        rng = np.random.default_rng(FIRST_SEED + number)
        scenes = [
            world.imagine(rng, 6, 9, more_print=0.35) if self.silent else world.imagine(rng) for _ in range(pictures)
        ]
        example = self.seen(scenes)
        if not self.silent:
            ids, labels, turn = self.talk(self._asked(scenes, rng), TEXT)
            example |= {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "turn": torch.tensor(turn)}
        return example

    def seen(self, scenes: Sequence[world.Scene]) -> dict[str, torch.Tensor]:
        """`pixels`, `patches` and `present` of an example."""
        pixels = np.stack([np.asarray(render(scene, self.side)) for scene in scenes])
        present = [[name in {thing.kind for thing in scene.things} for name in self.names] for scene in scenes]
        return {
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            "patches": torch.from_numpy(np.stack([self._patches(scene) for scene in scenes])),
            "present": torch.tensor(present, dtype=torch.float32),
        }

    def _asked(self, scenes: list[world.Scene], rng: np.random.Generator) -> Iterator[Fact]:
        """Facts in the order in which they are asked, as long as there is room."""
        if len(scenes) > 1:
            found = list(across(scenes, rng))
        else:
            *found, described = facts(scenes[0], rng)
            found += [fact for _ in range(2) for fact in pairs(found, rng)]
            yield described
        kinds = ["several" if fact.kind == "count" and fact.answer > "1" else fact.kind for fact in found]
        yield from by_appetite(found, [APPETITE[kind] for kind in kinds], rng)

    def taught(self, fact: Fact) -> tuple[list[int], list[int]]:
        """Ids and labels of a question and its answer, behind its earlier turns."""
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in (*fact.before, (fact.question, fact.answer)):
            head = [self.ids[USER]] if ids else []  # what is in front holds that of the first turn
            prompt = [*head, *self.encode(question), self.ids[ASSISTANT]]
            told = [*self.encode(answer), self.ids[EOS]]
            ids += prompt + told
            labels += [IGNORE] * len(prompt) + told
        return ids, labels

    def talk(self, asked: Iterator[Fact], room: int) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and turns of as many of the questions as `room` tokens hold, padded to that length."""
        ids: list[int] = []
        labels: list[int] = []
        turn: list[int] = []
        for number, fact in enumerate(asked, start=1):
            own, taught = self.taught(fact)
            if len(ids) + len(own) > room:
                break
            ids += own
            labels += taught
            turn += [number] * len(own)
        rest = room - len(ids)
        return ids + [self.ids[PAD]] * rest, labels + [IGNORE] * rest, turn + [-1] * rest

    def _patches(self, scene: world.Scene) -> np.ndarray:
        owner = coverage(scene, self.side)
        patches = np.full((4, *owner.shape), IGNORE, np.int64)
        patches[0] = self.ids["nothing"]
        for index, thing in enumerate(scene.things):
            where = owner == index
            patches[0][where] = self.ids[thing.kind]
            row, _, column = thing.place.partition(" ")  # a line has no column
            patches[2][where] = self.ids[row]
            if column:
                patches[3][where] = self.ids[column]
            if thing.kind in world.PRINTED and where.any():
                self._teach_print(patches[1], where, thing.detail)
            elif thing.detail:
                patches[1][where] = self.ids[thing.detail]
        return patches.reshape(4, -1)

    def _teach_print(self, details: np.ndarray, where: np.ndarray, text: str) -> None:
        """Each patch is taught the word, or the digit of a number, that is printed about there."""
        first = int(np.where(where.any(0))[0][0])
        for word, begin, end in columns(text):
            pieces = self.encode(word)
            for column in range(begin, end):
                if first + column < len(details):
                    piece = pieces[int((column - begin + 0.5) / (end - begin) * len(pieces))]
                    details[:, first + column][where[:, first + column]] = piece


def by_appetite(found: Sequence[Fact], appetites: Sequence[float], rng: np.random.Generator) -> Iterator[Fact]:
    """The facts in a random order, in which those of a larger appetite come earlier more often."""
    ranks = [rng.random() ** (1 / appetite) for appetite in appetites]
    yield from (found[index] for index in np.argsort(ranks)[::-1])


def keys(step: int, batch: int, single: bool) -> list[Key]:
    """The examples of one training step, `batch` pictures in all: two or three at a time in every fourth step.

    single: no, one at a time.
    """
    pictures = 1 if single or step % 4 < 3 else 2 + step // 4 % 2
    return [(step * batch + index, pictures) for index in range(batch // pictures)]
