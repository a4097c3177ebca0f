"""What was answered to glimpse's held-out questions, kept beside the rows of a folder, so that they can be compared."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.evaluation import exact_match, interval
from foveate.evaluation.results import write_csv
from foveate.glimpse import Question


class Answers:
    """The file `answers.csv` of a folder: for each run, by its keys, what was said to each of some questions."""

    def __init__(self, folder: Path, questions: Sequence[Question], keys: Sequence[str]) -> None:
        self.file, self.questions, self.keys = folder / "answers.csv", questions, tuple(keys)
        self.rows: list[dict[str, Any]] = list(csv.DictReader(self.file.open())) if self.file.exists() else []

    def add(self, said: Sequence[str], **keys: Any) -> np.ndarray:
        """Keep what was said; returns (questions,), 1 where it is right."""
        self.rows = [row for row in self.rows if not self._is(row, keys)]  # of a run that was stopped before its row
        for number, (question, text) in enumerate(zip(self.questions, said, strict=True)):
            about = {"number": number, "kind": question.kind, "answer": question.answer}
            self.rows.append({**self._named(keys), **about, "said": text})
        write_csv(self.file, self.rows)
        return self.right(**keys)

    def right(self, **keys: Any) -> np.ndarray:
        """(questions,), 1 where the answer of a run is right; empty where it was not made."""
        return np.array(
            [exact_match(row["said"], row["answer"]) for row in self.rows if self._is(row, keys)], np.float64
        )

    def means(self, values: np.ndarray) -> dict[str, float]:
        """Means over all questions and over each kind, with their 95 % intervals."""
        kinds = np.array([question.kind for question in self.questions])
        row: dict[str, float] = {}
        for kind in (None, *dict.fromkeys(kinds.tolist())):
            chosen = values if kind is None else values[kinds == kind]
            behind = "" if kind is None else f":{kind}"
            low, high = interval(chosen)
            row |= {f"accuracy{behind}": float(chosen.mean()), f"low{behind}": low, f"high{behind}": high}
        return row

    def _named(self, keys: dict[str, Any]) -> dict[str, str]:
        return {name: "" if keys[name] is None else str(keys[name]) for name in self.keys}

    def _is(self, row: dict[str, Any], keys: dict[str, Any]) -> bool:
        return all(row[name] == value for name, value in self._named(keys).items())
