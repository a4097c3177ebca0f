"""What the engine may rely on in what a method returns, said with the method's name where it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .method import Method

OPTIONAL = ("received", "given", "cls", "keys", "features", "states")


def check_mask(method: Method, chosen: object, shape: tuple[int | None, ...]) -> None:
    """Refuse a choice that is no boolean mask of this shape. None: of any size.

    Raises:
        ValueError: saying what it is.
    """
    if isinstance(chosen, Tensor):
        alike = len(shape) == chosen.ndim and all(
            want in (None, n) for want, n in zip(shape, chosen.shape, strict=True)
        )
        if alike and chosen.dtype == torch.bool:
            return
    what = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(
        f"{method.name} chooses with {what}, where a tensor of torch.bool and shape ({wanted}) is wanted: True for "
        "each token that stays"
    )


def check_scores(method: Method, scores: object, shape: tuple[int, ...]) -> None:
    """Refuse scores, where there are any, that are no numbers of this shape.

    Raises:
        ValueError: saying what they are.
    """
    if scores is None or (isinstance(scores, Tensor) and scores.shape == shape and scores.is_floating_point()):
        return
    what = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
    raise ValueError(
        f"{method.name} scores with {what}, where floating-point numbers of shape {tuple(shape)} are wanted, the "
        "larger the likelier a token stays"
    )


def check_budget(method: Method, chosen: Tensor, budget: Tensor | None) -> None:
    """Refuse a choice that keeps nothing, or more than its budget, of what it was asked about.

    chosen: bool (asked, ...). budget: (asked,); None for methods that say they do not keep to it.

    Raises:
        ValueError: with the numbers of the first such.
    """
    kept, most = chosen.flatten(1).sum(1), chosen[0].numel() if budget is None else budget
    wrong = (kept > most) | (kept == 0)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        limit = "" if budget is None else f" and its budget is {int(budget[at])}"
        raise ValueError(
            f"{method.name} keeps {int(kept[at])} of {chosen[at].numel()} tokens{limit}: at least one must stay, and "
            "at most the budget"
        )


@contextmanager
def reading(method: Method, tokens: object, declared: frozenset[str]) -> Iterator[None]:
    """Name what a method may have read without declaring it, where it fails inside the block.

    declared: what it says it reads.

    Raises:
        ValueError: in place of what was raised, which is its cause.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        absent = [name for name in OPTIONAL if name not in declared and getattr(tokens, name, ...) is None]
        if "NoneType" not in str(error) or not absent:
            raise
        raise ValueError(
            f"{method.name} failed ({error}). It was not given {', '.join(absent)}: what a method uses of them it must "
            'declare, such as reads = frozenset({"features"})'
        ) from error
