"""What pruning did, for those who run the server: counters in `/metrics`, and a line in the log of each worker.

The front end's process has vLLM's registry; the workers, which choose, run in others that nobody scrapes.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Any

logger = logging.getLogger("vllm.foveate")
SECONDS = 60.0
"""Between two lines of a worker."""


@cache
def _counter() -> Any:
    try:
        from prometheus_client import Counter

        return Counter("foveate:image_tokens", "Image tokens of prompts, before and after pruning.", ["stage"])
    except Exception as error:  # no statistics are worth a request
        logger.warning("foveate: image tokens are not counted in /metrics: %s", error)
        return None


def count_tokens(before: int, after: int) -> None:
    """Count the image tokens of a prompt. before: without pruning. after: those that are left."""
    counter = _counter()
    if counter is not None:
        counter.labels(stage="before").inc(before)
        counter.labels(stage="after").inc(after)


class Choosing:
    """Of a worker: the pictures that were encoded, and how long choosing took.

    By the host's clock: on a GPU the rest of the encoder's work, which choosing waits for, is in it.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.pictures = self.before = self.after = 0
        self.seconds = 0.0
        self.said = time.monotonic()

    def add(self, pictures: int, before: int, after: int, seconds: float) -> None:
        """Count one run of the encoder; once a minute, say what was counted since the last time."""
        self.pictures, self.before, self.after = self.pictures + pictures, self.before + before, self.after + after
        self.seconds += seconds
        if time.monotonic() - self.said >= SECONDS:
            logger.info("%s", self)
            self._begin()

    def __str__(self) -> str:
        each = 1000 * self.seconds / max(1, self.pictures)
        return (
            f"foveate: {self.after} of {self.before} image tokens kept in {self.pictures} encoded pictures, "
            f"{each:.1f} ms each to choose"
        )
