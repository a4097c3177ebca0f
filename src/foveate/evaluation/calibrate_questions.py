"""The questions of a calibration: asked at one budget after the other, every batch of answers kept on disk."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from foveate.asking.sure import Sure
from foveate.methods.base import Method

from .accuracy import advice
from .runner import Batches, clips_said, generate
from .search_questions import Memory


class Said(NamedTuple):
    """An answer. sure: of its least sure token, the probability. seconds: it took.

    kept: share of the image tokens; of methods that drop none and choose for each step, the share of the cache that the
    steps of its batch read, text included.
    """

    text: str
    sure: float
    kept: float
    seconds: float


Column = Sequence[Said | None]


@dataclass
class Asked:
    """All questions, to be asked under any method. notes: what is known already. advance: called after each batch."""

    model: Any
    processor: Any
    batches: Batches
    notes: Memory
    max_new_tokens: int
    advance: Callable[[], object] = lambda: None

    def __len__(self) -> int:
        return len(self.batches.items)

    def ask(self, method: Method | None, enough: Callable[[Column], bool] = lambda column: False) -> Column:
        """What is said under a method, or (None) untouched; None where it was not asked.

        enough: whether what was asked so far decides already.
        """
        import foveate

        key = json.dumps(method.to_dict() if method else None)
        known = self.notes.known.get(key, {})
        column: list[Said | None] = [None] * len(self)
        for index, row in known.items():
            column[int(index)] = Said(*row)
        batches = len(self.batches)
        with foveate.prune(self.model, method) if method else nullcontext() as pruned:
            sure = Sure.of(self.model)
            for batch in self.batches.mixed():
                if enough(column):
                    break
                if any(column[index] is None for index in batch.indices):
                    begun, shares = time.perf_counter(), list[float]()
                    try:
                        texts = generate(
                            self.model,
                            self.processor,
                            [batch],
                            self.max_new_tokens,
                            functools.partial(_note_kept, pruned, len(batch.indices), shares),
                            around=clips_said(pruned),
                            listeners=[sure],
                        )
                    except Exception as error:
                        raise advice(error) from error
                    seconds = (time.perf_counter() - begun) / len(texts)
                    by_index = dict(zip(sorted(batch.indices), texts, strict=True))
                    for row, index in enumerate(batch.indices):
                        column[index] = Said(by_index[index], sure.least[row], shares[row], round(seconds, 4))
                    known = {str(index): list(said) for index, said in enumerate(column) if said is not None}
                    self.notes.add(key, known)
                self.advance()
                batches -= 1
        for _ in range(batches):
            self.advance()  # what need not be asked
        return column


def _note_kept(pruned: Any, rows: int, shares: list[float]) -> None:
    """Note what `Said.kept` is of each sample. Later turns of a talk show no pictures."""
    report = None if pruned is None else pruned.report
    read = 1.0 if report is None or report.decoding is None else report.decoding.share
    for images in [[]] * rows if report is None else report.images:
        whole = sum(tokens for tokens, _ in images)
        shares.append(read * (sum(kept for _, kept in images) / whole if whole else 1.0))
