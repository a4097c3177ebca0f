"""What a calibration found, as a certificate, as a table, as a picture and in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.methods.base import Method
from foveate.methods.mass import by_mass

from .guarantees import Rule
from .results import Row, command_line
from .tables import Table

if TYPE_CHECKING:
    from .calibrate_options import Options

NAMES = {"fixed": "keep", "mass": "mass", "cascade": "sure"}
READ = "of the cache that a step reads"  # what a method promises that drops nothing and chooses for each step


@dataclass(frozen=True)
class Point:
    """One budget. at: the keep, the mass, or how sure a cascade must be. asked: questions, fewer than all where it
    failed early. kept: the mean of `Said.kept` over what was asked. groups: of each its questions, the sum of their
    losses, and p.
    """

    at: float
    asked: int
    kept: float
    seconds: float
    certified: bool
    groups: dict[str, tuple[int, float, float]]

    @property
    def lost(self) -> float:
        """The losses of all groups together."""
        return sum(total for _, total, _ in self.groups.values())

    @property
    def p(self) -> float:
        """Of the group that passes least."""
        return max(p for _, _, p in self.groups.values())

    def to_dict(self, name: str) -> Row:
        """JSON-safe. name: of `at`."""
        row: Row = {name: self.at, "asked": self.asked, "errors": round(self.lost, 6), "p": self.p}
        row |= {"kept": round(self.kept, 4), "seconds": round(self.seconds, 2), "certified": self.certified}
        if len(self.groups) > 1:
            row["groups"] = {name: {"n": n, "errors": e, "p": p} for name, (n, e, p) in self.groups.items()}
        return row


@dataclass(frozen=True)
class Found:
    """What one method may be promised.

    method: at no budget yet. points: those that were tried, the safest first. rungs: keeps of a cascade. seconds: all
    answers took.
    """

    label: str
    policy: str
    method: Method
    points: Sequence[Point]
    rungs: tuple[float, ...]
    seconds: float

    @property
    def best(self) -> Point | None:
        """The certified point that keeps least; None where nothing less than everything may be promised."""
        certified = [point for point in self.points if point.certified and point.kept < 1]
        return min(certified, key=lambda point: point.kept, default=None)

    @property
    def climbs(self) -> bool:
        """Whether what is promised asks again; a cascade of which nothing may be promised asks once, with all."""
        return bool(self.rungs) and self.best is not None

    @property
    def kept(self) -> float:
        """The mean share at the best point, of a cascade all its tries together."""
        return 1.0 if self.best is None else self.best.kept

    def chosen(self) -> Method:
        """The method as it is promised; of a cascade its first rung."""
        if self.policy == "mass":
            return by_mass(self.method, 1.0 if self.best is None else self.best.at)
        if self.best is None:
            return dataclasses.replace(self.method, keep=1.0)
        return dataclasses.replace(self.method, keep=self.rungs[0] if self.rungs else self.best.at)

    def __str__(self) -> str:
        if self.best is None:
            less = [point for point in self.points if point.at < 1]
            idle = any(point.certified for point in less) and all(point.kept == 1 for point in less)
            return f"keep=1.0 ({'it drops nothing here' if idle else 'nothing less can be promised'})"
        first = f"keep={', '.join(map(str, self.rungs))} first, " if self.rungs else ""
        what = READ if self.method.place == "decode" else "of the image tokens"
        return f"{first}{NAMES[self.policy]}={self.best.at:g}, {100 * self.kept:.1f} % {what}"


@dataclass(frozen=True)
class Certificate:
    """A promise and all it stands on. found: of every method that shared the error; the first is the one promised."""

    options: Options
    rule: Rule
    n: int
    groups: dict[str, int]
    whole_seconds: float
    found: Sequence[Found]
    about: Row

    @classmethod
    def of(cls, options: Options, rule: Rule, judge: Any, found: Sequence[Found], about: Row) -> Certificate:
        """judge: with what the untouched model said."""
        groups = {name: len(group) for name, group in judge.groups.items()}
        # What steps read is no share of tokens: methods that drop come first where they are promised anything.
        ordered = sorted(found, key=lambda each: (each.best is None, each.method.place == "decode", each.kept))
        return cls(options, rule, len(judge.whole), groups, judge.seconds, ordered, about)

    @property
    def best(self) -> Found:
        """What is promised."""
        return self.found[0]

    @property
    def statement(self) -> str:
        """The promise in a sentence."""
        options = self.options
        share = f"{100 * options.agree:g} %"
        graded = options.loss not in ("exact", "normalised")
        what = f"its answers agree with the untouched model's to at least {share} (1 less the mean {options.loss} loss)"
        if not graded:
            same = "the same answer" if options.loss == "exact" else "the same words"
            what = f"it gives {same} as the untouched model to at least {share} of them"
        each = " of each type" if options.groups else ""
        how = (
            f"with {100 * options.confidence:g} % confidence"
            if self.rule.error is not None
            else "on average over calibrations"
        )
        return f"{self.best.label}, {self.best}: on questions{each} drawn like these {self.n}, {what}, {how}"

    def to_dict(self) -> Row:
        """What the file holds: `Method.from_pretrained` reads the method."""
        best, options = self.best, self.options
        config = best.chosen().to_dict()
        promised: Row = {
            "statement": self.statement,
            "method": config,
            "policy": "fixed" if best.rungs and not best.climbs else best.policy,
            "agree": options.agree,
            "confidence": options.confidence if self.rule.error is not None else None,
            "guarantee": options.guarantee,
            "test": self.rule.kind,
            "alpha": self.rule.risk,
            "delta": self.rule.error,
            "loss": options.loss,
            "n": self.n,
            "groups": self.groups if options.groups else None,
            "grid": [1.0, *options.steps],
            "kept": round(best.kept, 4),
            "rungs": list(best.rungs) if best.climbs else [],
            "sure": best.best.at if best.climbs and best.best is not None else None,
            "tried": {
                each.label: {
                    "promised": str(each),
                    "kept": round(each.kept, 4),
                    "points": [point.to_dict(NAMES[each.policy]) for point in each.points],
                }
                for each in self.found
            },
            **self.about,
            "batch_size": options.batch_size,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
            "untouched_seconds": round(self.whole_seconds, 2),
            "seconds": round(self.seconds, 2),
            "command": command_line(),
            "date": date.today().isoformat(),
        }
        return {**config, "certificate": promised}

    @property
    def seconds(self) -> float:
        """All answers took, the untouched model's among them."""
        return self.whole_seconds + sum(each.seconds for each in self.found)

    def table(self) -> Table:
        """A row a budget."""
        head = ["method", "budget", "kept %", "asked", "errors", "p", "seconds", ""]
        body = [["untouched", "1.0", "100.0", str(self.n), "0", "", f"{self.whole_seconds:.1f}", "always"]]
        for each in self.found:
            for point in each.points:
                row = [each.label, f"{NAMES[each.policy]}={point.at:g}", f"{100 * point.kept:.1f}", str(point.asked)]
                row += [f"{point.lost:g}", f"{point.p:.2g}", f"{point.seconds:.1f}"]
                body.append([*row, "certified" if point.certified else "failed"])
        return Table(head, body, [False, False, True, True, True, True, True, False])

    def sentences(self) -> list[str]:
        """What the user is told."""
        rule = self.rule
        limit = (
            f"p must be at most {rule.error:.4g}"
            if rule.error is not None
            else f"p, here the bound, at most {rule.risk:g}"
        )
        lines = [self.statement]
        if rule.kind == "binomial":
            most = min(rule.most(n) for n in self.groups.values())
            lines.append(f"{limit}: {most} errors among {min(self.groups.values())} questions are the most that pass")
        else:
            lines.append(limit)
        times = f"{self.seconds:.0f} s, {self.seconds / max(self.whole_seconds, 1e-9):.1f} times the untouched pass"
        lines.append(f"all answers together took {times}")
        return lines


def draw(certificate: Row, path: Path, agreement: Sequence[tuple[float, float]] = ()) -> None:
    """Agreement over kept tokens, what is demanded, and the certified point, as a PNG.

    certificate: what the file holds. agreement: kept share and agreement of further points, such as held-out ones.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    promised = certificate["certificate"]
    figure, axes = plt.subplots(figsize=(6, 4))
    for label, tried in promised["tried"].items():
        rows = [row for row in tried["points"] if row["asked"] == promised["n"]]
        shares = [(1.0, 1.0), *((row["kept"], 1 - row["errors"] / row["asked"]) for row in rows)]
        axes.plot(
            *zip(*((100 * x, 100 * y) for x, y in shares), strict=True), marker="o", label=f"{label}, calibration"
        )
        best = min((row for row in rows if row["certified"]), key=lambda row: row["kept"], default=None)
        point = (best["kept"], 1 - best["errors"] / best["asked"]) if best else (1.0, 1.0)
        axes.plot(100 * point[0], 100 * point[1], "*", markersize=18, color="black", label=f"{label}, certified")
    if agreement:
        axes.plot(*zip(*((100 * x, 100 * y) for x, y in agreement), strict=True), "x--", label="held-out questions")
    axes.axhline(100 * promised["agree"], color="grey", linestyle=":", label="demanded")
    axes.set_xlabel("kept, %")
    axes.set_ylabel("answers as the untouched model's, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
