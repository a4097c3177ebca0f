"""What `foveate reproduce` says in the end: a row a method and keep, all that was measured and reported of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .accuracy import UNTOUCHED
from .plans import PARTS, Expected, Plan
from .results import Row, read, write
from .tables import Table, table

# Column of the summary: the column of a part. Where two parts have it, the first: eval's is of the questions.
COLUMNS = {
    "eval": {name: name for name in ("accuracy", "accuracy_low", "accuracy_high", "agreement")}
    | {name: name for name in ("agreement_low", "agreement_high", "kept_share", "kv_share")},
    "bench": {
        "first_token_x_untouched": "ttft_vs_untouched",
        "step_x_untouched": "decode_vs_untouched",
        "kv_share": "kv_share",
        "peak_memory_bytes": "peak_bytes",
    },
}
SHOWN = (
    *("accuracy", "agreement", "first_token_x_untouched", "step_x_untouched"),
    *("kept_share", "kv_share", "peak_memory_bytes"),
)


@dataclass(frozen=True)
class Summary:
    """Rows by method and keep, each with its "tasks" and "reported" figures; parts: the `run.json` of each."""

    plan: Plan
    rows: list[Row]
    parts: dict[str, Row]

    @classmethod
    def of(cls, plan: Plan, out: Path) -> Summary:
        """What the folder of a plan holds so far."""
        rows: dict[str, Row] = {}
        parts: dict[str, Row] = {}
        for part in PARTS:
            if not (out / part / "run.json").is_file():
                continue
            found, parts[part] = read(out / part)
            for row in _with_untouched(found) if part == "bench" else found:
                name = json.dumps([row["method"], row["keep"]])
                joined = rows.setdefault(name, {"method": row["method"], "keep": row["keep"], "tasks": {}})
                for ours, theirs in COLUMNS.get(part, {}).items():
                    if row.get(theirs) is not None:
                        joined.setdefault(ours, row[theirs])
                if part == "tasks":
                    joined["tasks"] = {key: row[key] for key in row if key not in ("method", "keep")}
        for row in rows.values():
            beside = [e for e in plan.expected if e.method == row["method"] and repr(e.keep) == repr(row["keep"])]
            row["reported"] = [{"what": e.what, "figure": e.figure, "source": e.source} for e in beside]
        order = [UNTOUCHED, *dict.fromkeys(row["method"] for row in rows.values())]
        return cls(plan, sorted(rows.values(), key=lambda row: order.index(row["method"])), parts)

    def table(self, intervals: bool = False) -> Table:
        """The rows, with a column for whatever was measured, and one for what is reported of them."""
        flat = []
        numbers = {key: number for number, key in enumerate(self._reported(), 1)}
        for row in self.rows:
            said = ", ".join(f"{each['figure']} [{numbers[_key(each)]}]" for each in row["reported"])
            flat.append({**row, **row["tasks"], "reported": said or None})
        tasks = list(dict.fromkeys(name for row in self.rows for name in row["tasks"]))
        shown = [name for name in SHOWN if any(name in row for row in self.rows)]
        return table(flat, ["method", "keep", *shown, *tasks, *["reported"] * bool(numbers)], intervals=intervals)

    def notes(self) -> list[str]:
        """What the reported figures are of, a line each."""
        return [f"[{number}] {what}: {source}" for number, (what, source) in enumerate(self._reported(), 1)]

    def origin(self) -> str:
        """What was run where, in one line."""
        about = next(iter(self.parts.values()))
        device = str(about["settings"].get("device"))
        took = (f"{part} {_spent(found['runs'])}" for part, found in self.parts.items())
        versions = (f"{name} {number}" for name, number in about["versions"].items())
        return f"{self.plan.model} on {device}: {', '.join(took)}; {', '.join(versions)}"

    def markdown(self) -> str:
        """The whole as a page."""
        text = [f"# {self.plan.title}", self.table(intervals=True).markdown()]
        if notes := self.notes():
            text.append("Reported, not measured here:\n\n" + "\n".join(f"- {line}" for line in notes))
        return "\n\n".join([*text, self.origin()]) + "\n"

    def to_json(self) -> str:
        """The rows, and where they come from."""
        parts = {
            part: {name: about[name] for name in ("settings", "versions", "finished", "runs")}
            for part, about in self.parts.items()
        }
        plan = {name: value for name, value in asdict(self.plan).items() if value is not None}
        return json.dumps({"plan": plan, "parts": parts, "rows": self.rows}, indent=1)

    def write(self, out: Path) -> None:
        """`summary.md` and `summary.json`."""
        write(out / "summary.md", self.markdown())
        write(out / "summary.json", self.to_json() + "\n")

    def _reported(self) -> list[tuple[str, str]]:
        """What stands beside the rows, in the plan's order."""
        there = {_key(each) for row in self.rows for each in row["reported"]}
        found: Sequence[Expected] = self.plan.expected
        return [key for key in dict.fromkeys((each.what, each.source) for each in found) if key in there]


def _key(reported: dict[str, Any]) -> tuple[str, str]:
    return reported["what"], reported["source"]


def _with_untouched(rows: Sequence[Row]) -> list[Row]:
    """The rows of bench, and in front the untouched model's, which is timed beside every one of them."""
    peaks = [row["untouched_peak_bytes"] for row in rows if row["untouched_peak_bytes"] is not None]
    same = dict.fromkeys(("ttft_vs_untouched", "decode_vs_untouched", "kv_share"), 1.0)
    first = {"method": UNTOUCHED, "keep": None, **same, "peak_bytes": max(peaks, default=None)}
    return [first, *rows] if rows else []


def _spent(runs: Sequence[Row]) -> str:
    seconds = sum(run.get("seconds") or 0 for run in runs)
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
