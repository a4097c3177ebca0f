"""Several processes that ask, each with a model of its own."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

from .accuracy import Answered, Failure, advice, ask
from .workplace import Options, Workplace, prepare

if TYPE_CHECKING:
    from foveate.asking.variant import Variant

_workplace: Workplace


class Processes:
    """`count` processes, which prepare their workplaces from `options`."""

    def __init__(self, count: int, options: Options) -> None:
        self.count, self.options = count, options

    def run(self, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Answered | Failure]]:
        """Ask all of them, each as it is done."""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(self.count, len(variants)), context, _begin, (self.options,))
        try:
            work = {pool.submit(_work, variant.label, variant.keep): variant for variant in variants}
            for future in as_completed(work):
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield work[future], Failure(error, str(error)) if error is not None else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(options: Options) -> None:
    global _workplace
    _workplace = prepare(options)


def _work(label: str, keep: float | int) -> Answered | Failure:
    place = _workplace
    variant = next(v for v in place.variants if (v.label, repr(v.keep)) == (label, repr(keep)))
    try:
        return ask(place.model, place.processor, place.batches, variant, place.max_new_tokens, lambda _: None)
    except Exception as error:
        return Failure(advice(error), traceback.format_exc())
