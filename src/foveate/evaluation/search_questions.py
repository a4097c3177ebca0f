"""The questions of a search: asked under one schedule after the other, every answer's worth kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.asking.mistake import Mistake
from foveate.methods.base import Method

from .accuracy import MATCHES, advice
from .results import Row, write
from .runner import Batches, generate
from .scores import exact_match, interval


class Memory:
    """What is known so far, until this process ends."""

    def __init__(self) -> None:
        self.known: Row = {}

    def add(self, key: str, value: Any) -> None:
        """Note one more."""
        self.known[key] = value


class Notes(Memory):
    """What is known so far, in a file beside the schedule's, so that an interrupted search goes on.

    settings: all that decides the answers. what: they are of, in a word.

    Raises:
        Mistake: when the file holds answers of another model, or to other questions.
    """

    def __init__(self, path: Path, settings: Row, what: str = "search") -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        super().__init__()
        if not path.exists():
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            theirs, self.known = dict(held["settings"]), dict(held["known"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Mistake(f"cannot read {path}, what an interrupted {what} asked: delete it") from error
        names = {**theirs, **self.settings}
        if other := [name for name in names if theirs.get(name) != self.settings.get(name)]:
            raise Mistake(f"{path} holds a {what} with another {', '.join(other)}: delete it, or give another --out")

    def add(self, key: str, value: Any) -> None:
        """Note one more, on disk."""
        super().add(key, value)
        write(self.path, json.dumps({"settings": self.settings, "known": self.known}) + "\n")


class Questions:
    """One part of the questions, to be asked under any method.

    score: "accuracy", whether an answer is right as `match` says, or "agreement", whether it is the untouched model's.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        batches: Batches,
        notes: Notes,
        *,
        score: str = "accuracy",
        match: str = "exact",
        max_new_tokens: int = 64,
    ) -> None:
        self.name, self.model, self.processor, self.batches, self.notes = name, model, processor, batches, notes
        self.score, self.match, self.max_new_tokens = score, match, max_new_tokens

    def __len__(self) -> int:
        return len(self.batches.items)

    def hits(self, method: Method | None, needed: float = 0.0) -> list[bool | None]:
        """Which answers hit under a method, or (None) untouched.

        needed: asks no further once fewer than this part of all answers can hit; what was not asked is None.
        """
        key = f"{self.name} {json.dumps(method.to_dict() if method else None)}"
        known = self.notes.known.get(key)
        if known is None or ("-" in known and not _decided(known, needed)):
            self.notes.add(key, self._ask(method, needed))
        return [None if mark == "-" else mark == "1" for mark in self.notes.known[key]]

    def _ask(self, method: Method | None, needed: float) -> str:
        """A letter a question: 1 for a hit, 0 for none, - where it was not asked."""
        import foveate

        marks, said = ["-"] * len(self), [""] * len(self)
        whole = self._untouched() if self.score == "agreement" and method else None
        try:
            with foveate.prune(self.model, method) if method else nullcontext():
                for batch in self.batches.mixed():
                    texts = generate(self.model, self.processor, [batch], self.max_new_tokens)
                    for index, text in zip(sorted(batch.indices), texts, strict=True):
                        said[index], marks[index] = text, "01"[self._hit(index, text, whole)]
                    if _decided(marks, needed):
                        break
        except Exception as error:
            raise advice(error) from error
        if method is None:
            self.notes.add(f"{self.name} untouched", said)
        return "".join(marks)

    def _hit(self, index: int, text: str, whole: Sequence[str] | None) -> bool:
        if self.score == "agreement":
            return whole is None or exact_match(text, whole[index])
        return any(MATCHES[self.match](text, answer) for answer in self.batches.items[index].answers)

    def _untouched(self) -> list[str]:
        """What the untouched model says."""
        self.hits(None)
        return list(self.notes.known[f"{self.name} untouched"])


def _decided(marks: Sequence[str], needed: float) -> bool:
    """Whether fewer than the needed part of all can hit."""
    return len(marks) - marks.count("0") < needed * len(marks) - 1e-9


@dataclass(frozen=True)
class Part:
    """What a schedule costs on one part of the questions, with 95 % intervals; scores in [0, 1].

    lost: the untouched model's score less the schedule's.
    """

    questions: int
    untouched: float
    score: float
    low: float
    high: float
    lost: float
    lost_low: float
    lost_high: float

    @classmethod
    def of(cls, asked: Questions, method: Method, seed: int) -> Part:
        """Ask both. seed: of the bootstrap."""
        whole, hits = ([int(hit or 0) for hit in asked.hits(each)] for each in (None, method))
        lost = [one - other for one, other in zip(whole, hits, strict=True)]
        low, high = interval(hits, seed=seed)
        return cls(len(hits), mean(whole), mean(hits), low, high, mean(lost), *interval(lost, seed=seed))


def mean(values: Sequence[int]) -> float:
    """Of hits: their share."""
    return sum(values) / len(values)
