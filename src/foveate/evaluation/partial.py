"""The row that is being measured: what is answered of it, batch by batch, so that an interrupted one goes on."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .results import Row, write
from .runner import Batch


class Partial:
    """What each batch said and cost under one variant.

    path: of the file beside the rows; None to keep nothing. column: the variant. What the file holds of another one is
    forgotten, and a file that cannot be read, too: its batches are asked again.
    """

    def __init__(self, path: Path | None, column: str) -> None:
        self.path, self.column = path, column
        self.known: dict[str, Row] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
                held = json.loads(path.read_text(encoding="utf-8"))
                if held["column"] == column:
                    self.known = {key: row for key, row in held["batches"].items() if {"said", "seconds"} <= set(row)}

    def get(self, batch: Batch) -> Row | None:
        """What is known of a batch."""
        return self.known.get(_key(batch))

    def add(self, batch: Batch, row: Row) -> None:
        """Note a batch, on disk."""
        self.known[_key(batch)] = row
        if self.path is not None:
            write(self.path, json.dumps({"column": self.column, "batches": self.known}) + "\n")

    def done(self) -> None:
        """The row is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _key(batch: Batch) -> str:
    return ",".join(map(str, batch.indices))
