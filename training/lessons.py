"""Turns scenes of the world into training examples: one picture, many questions in one sequence.

Every question sees the picture and itself but no other question, and starts at the same position, so each one
looks to the model exactly as it does alone in a chat.
"""

from functools import cached_property

import numpy as np
import torch
from model import ASSISTANT, BOS, EOS, IMAGE, PAD, USER
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from foveate.glimpse import world

GRID = world.SIZE // world.PATCH
TEXT = 152  # tokens of questions and answers a picture
IGNORE = -100
# How often each kind is asked: more where it is learned late, or where few scenes have anything to ask about.
APPETITE = {
    "where": 1.5,
    "exists": 1.2,
    "count": 1.0,
    "several": 5.0,  # a count above one: without this, "one" is always the better guess
    "what": 1.2,
    "total": 3.0,
    "colour": 1.5,
    "number": 1.0,
    "word": 1.0,
}
FIRST_SEED = 10_000_000  # everything below is held out


class Lessons(Dataset[dict[str, torch.Tensor]]):
    """Examples `start` to `stop`, each from its own seed.

    An example holds `pixels` (3, 168, 168) uint8; `ids`, `labels` and `turn` (n,) of the sequence after its
    first 146 tokens, which are the same for all; `patches` (4, 144): vocabulary ids of what lies on each
    patch (thing, detail, row, column; -100: none); and `present` (names,) of what is in the picture.
    `silent` examples have fuller pictures with more print, and no questions.
    """

    def __init__(self, processor: LlavaProcessor, start: int, stop: int, silent: bool = False) -> None:
        self.processor, self.start, self.stop, self.silent = processor, start, stop, silent

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of every token."""
        return self.processor.tokenizer.get_vocab()

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens in front of every question."""
        return [self.ids[BOS], self.ids[USER], *[self.ids[IMAGE]] * GRID**2]

    @cached_property
    def names(self) -> list[str]:
        """What can lie on a patch."""
        return ["nothing", *world.SPRITES, *world.SHAPES, "number", "word"]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain words."""
        return self.processor.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(FIRST_SEED + self.start + index)
        scene = world.imagine(rng, 6, 9, more_print=0.35) if self.silent else world.imagine(rng)
        present = np.zeros(len(self.names), np.float32)
        present[[self.names.index(thing.kind) for thing in scene.things]] = 1
        example = {
            "pixels": torch.from_numpy(np.asarray(world.render(scene)).copy()).permute(2, 0, 1),
            "patches": torch.from_numpy(self._patches(scene)),
            "present": torch.from_numpy(present),
        }
        if not self.silent:
            ids, labels, turn = self._talk(scene, rng)
            example |= {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "turn": torch.tensor(turn)}
        return example

    def _talk(self, scene: world.Scene, rng: np.random.Generator) -> tuple[list[int], list[int], list[int]]:
        facts = list(world.facts(scene, rng))
        kinds = ["several" if kind == "count" and answer > "1" else kind for kind, _, _, answer in facts[:-1]]
        ranks = [rng.random() ** (1 / APPETITE[kind]) for kind in kinds]
        order = [facts[index] for index in np.argsort(ranks)[::-1]]
        ids: list[int] = []
        labels: list[int] = []
        turn: list[int] = []
        for number, (_, question, _, answer) in enumerate([facts[-1], *order], start=1):
            asked = [*self.encode(question), self.ids[ASSISTANT]]
            told = [*self.encode(answer), self.ids[EOS]]
            if len(ids) + len(asked) + len(told) > TEXT:
                break
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
            turn += [number] * (len(asked) + len(told))
        rest = TEXT - len(ids)
        return ids + [self.ids[PAD]] * rest, labels + [IGNORE] * rest, turn + [-1] * rest

    def _patches(self, scene: world.Scene) -> np.ndarray:
        owner = world.coverage(scene)
        patches = np.full((4, GRID, GRID), IGNORE, np.int64)
        patches[0] = self.ids["nothing"]
        for index, thing in enumerate(scene.things):
            where = owner == index
            patches[0][where] = self.ids[thing.kind]
            row, column = thing.place.split()
            patches[2][where], patches[3][where] = self.ids[row], self.ids[column]
            if thing.kind == "number":  # each patch is taught the digit that is printed about there
                columns = np.where(where.any(0))[0]
                digits = self.encode(thing.detail)
                for position, column_index in enumerate(columns):
                    digit = digits[int((position + 0.5) / len(columns) * len(digits))]
                    patches[1][:, column_index][where[:, column_index]] = digit
            elif thing.detail:
                patches[1][where] = self.ids[thing.detail]
        return patches.reshape(4, -1)
