"""Questions with known answers: glimpse's own, or those in a folder of the user's."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.asking.clips import MAX_FRAMES, Clip, frames_of, is_clip, open_clip
from foveate.asking.mistake import Mistake
from foveate.asking.pictures import open_picture
from foveate.glimpse.happenings import CLIP_KINDS
from foveate.glimpse.world import Question

from .scores import exact_match

FILE = "data.jsonl"


@dataclass(frozen=True)
class Item:
    """A question. images: pictures, or files that are opened when needed. answers: any of them is right.

    before: questions that the model is asked first, with the pictures, in turns of their own. clip: whether the images
    are the frames of one clip, or the one file is a film. max_frames: of a clip with more so many, at an even stride.
    """

    images: tuple[Image.Image | Path, ...]
    question: str
    answers: tuple[str, ...]
    type: str | None = None
    line: int | None = None
    before: tuple[str, ...] = ()
    clip: bool = False
    max_frames: int = MAX_FRAMES

    @property
    def shows_clip(self) -> bool:
        """Whether it is about a clip."""
        return self.clip or any(isinstance(image, Path) and is_clip(image) for image in self.images)

    @property
    def asked(self) -> tuple[str, ...]:
        """What the model is asked, turn by turn."""
        return (*self.before, self.question)

    def pictures(self) -> list[Image.Image]:
        """The pictures, or the frames of the clip, opened."""
        return [frame for one in self.shown() for frame in frames_of(one)]

    def shown(self) -> list[Image.Image | Clip]:
        """The pictures, or the clip, opened."""
        opened = [
            image
            if isinstance(image, Image.Image)
            else open_clip(image, max_frames=self.max_frames)
            if is_clip(image)
            else open_picture(image)
            for image in self.images
        ]
        return [Clip.of(opened, self.max_frames)] if self.clip else opened


def from_glimpse(count: int, kinds: Sequence[str] | None = None, first: int = 0) -> list[Item]:
    """`count` held-out questions of glimpse from number `first` on, all kinds (or those given) in turn."""
    from foveate import glimpse

    return as_items(glimpse.heldout(count, kinds=kinds or glimpse.KINDS, first=first))


def as_items(questions: Sequence[Question]) -> list[Item]:
    """Questions of glimpse, as a model is asked them."""
    return [
        Item(
            q.images,
            q.question,
            (q.answer,),
            q.kind,
            None,
            tuple(asked for asked, _ in q.before),
            len(q.images) > 1 and q.kind in CLIP_KINDS,  # some kinds are asked of single pictures, too
        )
        for q in questions
    ]


def from_folder(
    folder: str | Path, matches: Callable[[str, str], bool] = exact_match, labelled: bool = True
) -> tuple[list[Item], list[tuple[int, str]], str]:
    """The questions in `folder/data.jsonl`, line and cause of each row that cannot be used, and a digest of all that.

    A row is a JSON object with `image` (a file name, or a list of them, seen from the folder; also `images`) or `clip`
    (a film, or a list of the files that are its frames), `question`, `answers` (accepted texts; also `answer`) and, if
    wanted, `type` and `before`: a question, or a list of them, that the model is asked first, in turns of their own.
    matches: compares what is said with an answer; one that silence matches cannot be used. labelled: whether a row
    without answers cannot be used, either.

    Raises:
        Mistake: when there is no such file, or no row can be used.
    """
    path = Path(folder) / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = f"--data takes a folder with a {FILE} in it"
        raise Mistake(f"cannot read {path}: {error.strerror} ({hint})") from error
    items, bad = [], []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            items.append(_item(line, path.parent, number, matches, labelled))
        except (Mistake, ValueError) as error:
            bad.append((number, " ".join(str(error).split())))
        except RecursionError:
            bad.append((number, "nested too deeply: write one object with texts and lists of texts"))
    if not items:
        first = "line {}: {}".format(*bad[0]) if bad else "it is empty"
        raise Mistake(f"{path} has no row that can be used: {first}")
    return items, bad, _digest(data, items)


def draw(items: Sequence[Item], count: int | None, seed: int) -> list[Item]:
    """`count` of the items, drawn at random, in their order; all where `count` is None or more than there are."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def split(items: Sequence[Item], count: int, rest: int, seed: int) -> tuple[list[Item], list[Item]]:
    """`count` of the items and `rest` others about other pictures, drawn at random; fewer where there are no more."""
    alike: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        alike.setdefault(tuple(map(str, item.images)), []).append(item)
    drawn = list(alike.values())
    random.Random(seed).shuffle(drawn)
    parts: tuple[list[Item], list[Item]] = ([], [])
    for group in drawn:
        part = parts[len(parts[0]) >= count]
        part += group[: (rest if part is parts[1] else count) - len(part)]
    return parts


def _digest(data: bytes, items: Sequence[Item]) -> str:
    """Of what decides the questions and their answers: the file, which of its rows can be used, and their pictures."""
    paths = dict.fromkeys(path for item in items for path in item.images if isinstance(path, Path))
    pictures = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    digest = hashlib.sha256(data)
    for item in items:  # without the paths: the folder may be moved
        digest.update(" ".join([f"\n{item.line}", *(pictures[p] for p in item.images if isinstance(p, Path))]).encode())
    return digest.hexdigest()[:16]


def _item(line: bytes, folder: Path, number: int, matches: Callable[[str, str], bool], labelled: bool) -> Item:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Mistake("not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise Mistake(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Mistake('not an object: write {"image": ..., "question": ..., "answers": [...]}')
    clip = "clip" in row
    if clip and row.keys() & {"image", "images"}:
        raise Mistake('"image" and "clip" are both there: a row is about pictures or about one clip')
    names = _texts(row, "clip" if clip else "image", "images")
    if clip and len(names) > 1 and any(is_clip(name) for name in names):
        raise Mistake('"clip" must be one film, or a list of pictures that are its frames')
    question, kind = row.get("question"), row.get("type")
    if not isinstance(question, str) or not question.strip():
        raise Mistake('"question" is missing, empty or no text')
    if kind is not None and (not isinstance(kind, str) or not kind.strip()):
        raise Mistake('"type" is empty or no text: leave it out or name one')
    answers = _texts(row, "answers", "answer") if labelled or row.keys() & {"answers", "answer"} else []
    if empty := [answer for answer in answers if matches("", answer)]:
        raise Mistake(f"the answer {json.dumps(empty[0])[:60]} holds no word to compare: an empty one would be right")
    before = _texts(row, "before") if row.get("before") else []
    if re.search("[\ud800-\udfff]", "".join([*names, question, kind or "", *answers, *before])):
        raise Mistake("a text holds half a letter (a lone surrogate), which no file can hold: write it out")
    images = [folder / name for name in names]
    item = Item(tuple(images), question.strip(), tuple(answers), kind and kind.strip(), number, tuple(before), clip)
    item.shown()  # a broken picture or film shows now, not in the middle of the run
    return item


def _texts(row: dict[str, Any], *names: str) -> list[str]:
    """The one or several texts under the first of the names that is there; numbers count as texts."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise Mistake(f'no "{names[0]}"')
    value = row[name]
    texts = value if isinstance(value, list) else [value]
    if not texts or any(isinstance(t, bool) or not isinstance(t, (str, int, float)) for t in texts):
        raise Mistake(f'"{name}" must be a text or a list of texts, got {json.dumps(value)[:60]}')
    if any(not str(text).strip() for text in texts):
        raise Mistake(f'"{name}" holds an empty text')
    return [str(text).strip() for text in texts]
