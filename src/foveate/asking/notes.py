"""Where commands say what is not their result: on stderr, unless nobody wants to hear it."""

from __future__ import annotations

import sys

from rich.console import Console

_quiet = False


def be_quiet(wanted: bool) -> None:
    """Say nothing from here on but results and mistakes, or speak again."""
    global _quiet
    _quiet = wanted


def notes() -> Console:
    """A console for progress and remarks."""
    return Console(stderr=True, quiet=_quiet)


def moving() -> Console:
    """The same for what moves, such as a spinner: only where somebody sees it."""
    return Console(stderr=True, quiet=_quiet or not sys.stderr.isatty())
