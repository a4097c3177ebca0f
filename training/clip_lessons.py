"""Turns clips into training examples: frames, many questions in one sequence, and what happens on each patch.

Some clips are watched in parts, as in a chat to which frames are added: a question about what has been seen so far is
asked and answered before the next frames come.
"""

from collections.abc import Iterator

import numpy as np
import torch
from lessons import FIRST_SEED, IGNORE, Key, Lessons, by_appetite
from model import BOS, IMAGE, USER
from pupils import Batch, Pupil, alone, near
from transformers import LlavaForConditionalGeneration

from foveate.glimpse import clips
from foveate.glimpse import scene as world
from foveate.glimpse.drawing import coverage
from foveate.glimpse.facts import Fact
from foveate.glimpse.happenings import happenings

TEXT = 168  # tokens of questions and answers an example
APPETITE = {
    "direction": 1.5,
    "at_start": 2.0,
    "at_end": 1.5,
    "happens": 1.0,
    "appears": 3.0,
    "disappears": 3.0,
    "moves_count": 3.0,
    "first": 4.0,
    "colour_end": 1.5,
    "exists": 0.25,
    "where": 0.5,
}
PARTS = (0.6, 0.25, 0.15)  # how often a clip is watched at once, in two parts, in three


class ClipLessons(Lessons):
    """Examples by number and how many frames they have, as `Lessons`; ids, labels and turn hold the frames, too.

    `happens` (2, frames, 64) are vocabulary ids of what has happened so far to the thing on each patch ("left",
    "appears", "disappears" where it was, "turns", "nothing"), and of the thing; -100 where no thing was, and in the
    first frame.
    """

    side = clips.SIZE

    def __getitem__(self, key: Key) -> dict[str, torch.Tensor]:
        number, frames = key
        rng = np.random.default_rng(FIRST_SEED + number)
        clip = clips.imagine(rng, frames)
        example = self.seen(list(clip.scenes()))
        if self.silent:
            return example
        ids, labels = self._watched(clip, rng)
        shared = len(ids)
        more, taught, turn = self.talk(self._asked_of(clip, rng), 2 + frames * clips.TOKENS + TEXT - shared)
        example |= {"ids": torch.tensor(ids + more), "labels": torch.tensor(labels + taught)}
        example["turn"] = torch.tensor([0] * shared + turn)
        example["happens"] = torch.from_numpy(self._happens(clip))
        return example

    def _watched(self, clip: clips.Clip, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Ids and labels of the frames, and of the questions asked between them."""
        pauses = int(rng.choice(len(PARTS), p=PARTS))
        begun, frame = [self.ids[BOS], self.ids[USER]], [self.ids[IMAGE]] * clips.TOKENS
        ids, labels, shown = list(begun), [IGNORE] * len(begun), 0
        for until in sorted(int(each) for each in rng.choice(range(2, len(clip)), pauses, replace=False)):
            question, answer = self.taught(next(self._asked_of(clip.until(until), rng, briefly=True)))
            ids += frame * (until - shown) + question + [self.ids[USER]]
            labels += [IGNORE] * (clips.TOKENS * (until - shown)) + answer + [IGNORE]
            shown = until
        rest = len(clip) - shown
        return ids + frame * rest, labels + [IGNORE] * (clips.TOKENS * rest)

    def _asked_of(self, clip: clips.Clip, rng: np.random.Generator, briefly: bool = False) -> Iterator[Fact]:
        *found, described = happenings(clip, rng)
        if not briefly:
            yield described
        yield from by_appetite(found, [APPETITE[fact.kind] for fact in found], rng)

    def _happens(self, clip: clips.Clip) -> np.ndarray:
        side = self.side // world.PATCH
        found = np.full((2, len(clip), side, side), IGNORE, np.int64)
        for frame in range(1, len(clip)):
            tracks = sorted(clip.until(frame + 1).tracks, key=lambda track: track.frames[-1] is not None)
            everything = world.Scene(tuple(track.seen[-1] for track in tracks), clip.background)
            owner = coverage(everything, self.side)  # what is gone lies below what is there
            for index, track in enumerate(tracks):
                word = track.happening.removeprefix("moves ").split()[0]
                found[0, frame][owner == index] = self.ids[word]
                found[1, frame][owner == index] = self.ids[track.kind]
        return found.reshape(2, len(clip), -1)


class ClipPupil(Pupil):
    """The same for clips. Half way up the language model, image tokens learn to be near the words of what has happened.

    So the layers behind find "appears" and "left" in the tokens, as they find "dog" and "top".
    """

    def __init__(self, model: LlavaForConditionalGeneration, lessons: Lessons) -> None:
        super().__init__(model, lessons)
        self.image = lessons.ids[IMAGE]
        said = [*clips.DIRECTIONS, "appears", "disappears", "turns", "nothing"]
        self.told = [[lessons.ids[word] for word in group] for group in (said, lessons.names)]
        self.half = model.config.text_config.num_hidden_layers // 2

    def answer_loss(self, tokens: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        core, ids = self.model.model, batch["ids"]
        inputs = core.language_model.embed_tokens(ids).to(tokens.dtype)
        frames = ids == self.image
        inputs = inputs.masked_scatter(frames[..., None], tokens)
        mask, positions = alone(batch["turn"], 0)
        out = core.language_model(
            inputs_embeds=inputs,
            attention_mask=mask.to(tokens.dtype),
            position_ids=positions,
            use_cache=False,
            output_hidden_states=True,
        )
        return self.score(out.last_hidden_state, 0, batch) | {
            name: near(out.hidden_states[self.half][frames], core.language_model.embed_tokens.weight, words, targets)
            for name, words, targets in zip(("happens", "to"), self.told, batch["happens"].unbind(1), strict=True)
        }


def clip_keys(step: int, batch: int) -> list[Key]:
    """The examples of one training step, about `batch` frames in all: clips of another length every step."""
    frames = clips.LENGTHS[step % len(clips.LENGTHS)]
    each = max(batch // frames, 1)
    return [(step * batch + index, frames) for index in range(each)]
