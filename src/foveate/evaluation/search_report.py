"""What a search found, as a file, as tables and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from foveate.methods.schedules import ScheduledMethod, token_layers

from .results import Row, command_line
from .schedules import Rates
from .search_questions import Part
from .tables import Table

PREMISE = 0.7  # Kendall's tau between layers, as it is reported for the models of G-Search


@dataclass(frozen=True)
class Found:
    """A schedule and what is known of it.

    rates: of layers 1 and deeper. tolerance: what the search allowed to be lost. evaluations: schedules asked.
    contradictions: pairs of schedules, the second of which keeps no more in any layer and passes where the first fails.
    tau: (layers, layers) agreement of the untouched model's layers. smallest: whether nothing less could be asked.
    """

    method: ScheduledMethod
    rates: Rates
    tolerance: float
    search: Part
    test: Part
    evaluations: int
    contradictions: list[tuple[Rates, Rates]]
    tau: list[list[float]]
    smallest: bool

    def to_dict(self, settings: Row) -> Row:
        """What the file holds: `Method.from_pretrained` reads it."""
        about: Row = {
            "rates": self.rates,
            "token_layers": token_layers(self.rates),
            "search": asdict(self.search),
            "test": asdict(self.test),
            "evaluations": self.evaluations,
            "contradictions": self.contradictions,
            "kendall_tau": [[round(value, 4) for value in row] for row in self.tau],
        }
        return {**self.method.to_dict(), "search": {**about, "settings": settings, "command": command_line()}}

    def scores(self) -> Table:
        """What it costs on either part of the questions."""
        body = []
        for name, part in (("search", self.search), ("test", self.test)):
            values = (part.untouched, part.score, part.low, part.high, part.lost, part.lost_low, part.lost_high)
            whole, here, low, high, lost, least, most = (f"{100 * value:.1f}" for value in values)
            body.append([name, f"{part.questions:,}", whole, f"{here} [{low}, {high}]", f"{lost} [{least}, {most}]"])
        return Table(
            ["questions", "number", "untouched %", "schedule %", "lost"], body, [False, True, True, True, True]
        )

    def layers(self) -> Table:
        """What every layer sees, and how it agrees with the others."""
        head = ["layer", "sees %", *(f"tau {layer}" for layer in range(len(self.tau)))]
        body = [
            [str(layer), f"{100 * rate:.1f}", *(f"{value:.2f}" for value in row)]
            for layer, (rate, row) in enumerate(zip((1.0, *self.rates), self.tau, strict=True))
        ]
        return Table(head, body, [True] * len(head))

    def sentences(self) -> list[str]:
        """All that in words."""
        share = token_layers(self.rates)
        lines = [
            f"layers 1 to {len(self.rates)} see {percent(self.rates)}; all {len(self.rates) + 1} together "
            f"{100 * share:.1f} % of the image tokens, {1 / share:.2f} times fewer",
            self._held(),
            self._monotone(),
            self._premise(),
        ]
        return [*lines, *["nothing less could be asked: give a --grid with smaller values"] * self.smallest]

    def _held(self) -> str:
        part = self.test
        within = part.lost <= self.tolerance + 1e-9
        line = (
            f"on {part.questions:,} questions that the search has not seen it loses {100 * part.lost:.1f} points, "
            f"{'within' if within else 'more than'} the tolerance of {100 * self.tolerance:g}"
        )
        if within and part.lost_high > self.tolerance + 1e-9:
            line += f"; it may be up to {100 * part.lost_high:.1f} (95 % interval)"
        return line

    def _monotone(self) -> str:
        asked = f"{self.evaluations} schedules were asked; "
        if not self.contradictions:
            return asked + "none contradicts that who keeps less never scores better"
        more, less = self.contradictions[0]
        return (
            f"{asked}the score is not monotone: {percent(less)} passes, and {percent(more)}, no less in any layer, "
            f"fails ({len(self.contradictions)} such pairs); more questions (--count) decide better"
        )

    def _premise(self) -> str:
        behind = [value for i, row in enumerate(self.tau) for value in row[1:i]]
        if not behind:
            return "with so few layers nothing can be said of whether they rank image tokens alike"
        least, most = min(behind), max(behind)
        line = f"between layers behind the first, Kendall's tau of the rankings is {least:.2f} to {most:.2f}"
        if least >= PREMISE:
            return f"{line}: they agree, as a search layer by layer supposes ({PREMISE} or more is reported)"
        return (
            f"{line}, where {PREMISE} or more is reported for G-Search: that deep layers want a part of what shallow "
            "ones want does not hold here, so that the schedule need not be the best there is; trust the test"
        )


def percent(rates: Sequence[float]) -> str:
    """Rates in a few characters."""
    return " ".join(f"{100 * rate:.3g}" for rate in rates) + " %"
