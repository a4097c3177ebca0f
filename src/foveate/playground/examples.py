"""Pictures and a clip to begin with, drawn by glimpse, which needs no file of its own for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foveate import glimpse
from foveate.asking.loading import GLIMPSE, GLIMPSE_VIDEO
from foveate.glimpse import Question

PICTURE, CLIP = 8, 3  # of the held-out questions: all of a picture, and what happens in a clip


@dataclass(frozen=True)
class Example:
    """Files and what to ask about them. model: the built-in one that sees such."""

    files: list[str]
    question: str
    model: str
    one_clip: bool


def draw_examples(folder: Path) -> tuple[Example, Example]:
    """A picture and a clip, as files in this folder."""
    picture = _save(glimpse.heldout(1, first=PICTURE)[0], folder / "picture", GLIMPSE)
    return picture, _save(glimpse.heldout_clips(1, first=CLIP)[0], folder / "clip", GLIMPSE_VIDEO)


def _save(question: Question, folder: Path, model: str) -> Example:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{folder.name}-{number}.png" for number in range(1, len(question.images) + 1)]
    for picture, file in zip(question.images, files, strict=True):
        picture.save(file)
    return Example(list(map(str, files)), question.question, model, model == GLIMPSE_VIDEO)
