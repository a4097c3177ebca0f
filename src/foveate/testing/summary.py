"""What was checked, in a line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One method on one family.

    tokens, kept: of the first image of the first prompt. difference: the largest of all runs between a logit and the
    reference's; None where no reference can imitate the method. note: why so, or why the method does not fit.
    """

    method: str
    family: str
    tokens: int = 0
    kept: int = 0
    difference: float | None = None
    note: str = ""

    def __str__(self) -> str:
        kept = f"keeps {self.kept} of {self.tokens} image tokens" if self.tokens else "does not fit"
        found = self.note if self.difference is None else f"logits within {self.difference:.1e} of the reference"
        return f"{self.method} on {self.family}: {kept}, {found}"


@dataclass(frozen=True)
class Summary:
    """All that was checked; prints one line a family (of `check_family`: a method)."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))
