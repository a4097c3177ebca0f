"""How much an answer differs from the untouched model's: 0 where it is the same, 1 where it is another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module

from foveate.asking.mistake import Mistake, one_line

from .scores import exact_match, words

Loss = Callable[[str, str], float]


def exact(said: str, untouched: str) -> float:
    """0 for the same text."""
    return float(said.strip() != untouched.strip())


def normalised(said: str, untouched: str) -> float:
    """0 for the same words, whatever their case, spacing and final full stop."""
    return float(not exact_match(said, untouched))


def f1(said: str, untouched: str) -> float:
    """1 less the harmonic mean of the parts of either answer's words that the other has, too; in [0, 1]."""
    ours, theirs = (Counter(words(text).split()) for text in (said, untouched))
    if not ours or not theirs:
        return float(ours != theirs)
    return 1 - 2 * (ours & theirs).total() / (ours.total() + theirs.total())


LOSSES: dict[str, Loss] = {"exact": exact, "normalised": normalised, "f1": f1}
BINARY = ("exact", "normalised")


def find_loss(name: str) -> Loss:
    """One of `LOSSES`, or a function of one's own, `module:function`, from both answers to a number in [0, 1].

    Raises:
        Mistake: where there is none.
    """
    if name in LOSSES:
        return LOSSES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise Mistake(f"--loss {name} is unknown: use {', '.join(LOSSES)}, or module:function of your own")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever importing it raises
        raise Mistake(f"--loss {name} cannot be imported: {one_line(error)}") from error

    def checked(said: str, untouched: str) -> float:
        try:
            value = float(found(said, untouched))
        except Exception as error:
            raise Mistake(f"--loss {name} fails on {said!r} and {untouched!r}: {one_line(error)}") from error
        if not 0 <= value <= 1:
            raise Mistake(f"--loss {name} gives {value} for {said!r} and {untouched!r}: it must lie in [0, 1]")
        return value

    if checked("the same", "the same") != 0:
        raise Mistake(f"--loss {name} is not 0 for two equal answers: it must say how much they differ")
    return checked
