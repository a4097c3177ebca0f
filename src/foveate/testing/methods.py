"""Checking a method on the tiny models of all families that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.errors import UnsupportedError
from foveate.methods import get_method
from foveate.methods.base import Method

from .examining import examine
from .subjects import of_tiny
from .summary import Line, Summary
from .tiny import known


def check_method(method: str | Method, *, families: Sequence[str] | None = None, **options: Any) -> Summary:
    """Check a method against the untouched model, on tiny random models; takes a few seconds a family.

    On each family, one sample and a left-padded batch, eager and sdpa, prefill and decoding steps:

    - the logits are those of the untouched model whose masks hide what the report says was dropped (of a method that
      merges before the LLM or inside it, with the merged tokens in place; others that do more than drop tokens are
      not compared),
    - with `keep=1.0` they differ from the untouched model's by exactly 0,
    - masks are booleans of the right shape, the budget is met, and something of every image stays,
    - a second run keeps the same tokens,
    - the model is afterwards what it was, bit by bit.

    method: a name, or a method object. families: names of tiny models (`foveate.testing.tiny.known()`); by default all
    families that the method fits. options: of the method, such as `keep=0.25`.

    Raises:
        AssertionError: with a sentence that names method, family and what differs.
        UnsupportedError: where the method does not fit one of `families`, or no family at all.
    """
    asked = method if isinstance(method, Method) else get_method(method, **options)
    if isinstance(method, Method) and options:
        raise ValueError(f"options ({', '.join(options)}) go with a method's name; give a method object its own")
    names = families or [name for name, tiny in sorted(known().items()) if not tiny.variant]
    lines = []
    for name in names:
        try:
            lines.append(examine(asked, of_tiny(name)))
        except UnsupportedError as error:
            if families:
                raise
            lines.append(Line(asked.name, name, note=str(error)))
    if not any(line.tokens for line in lines):
        raise UnsupportedError(f"{asked.name} fits no family: {lines[0].note}")
    return Summary(tuple(lines if families else [line for line in lines if line.tokens]))
