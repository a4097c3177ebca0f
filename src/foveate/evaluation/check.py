"""`foveate check`: what the pruned model says beside the dense reference, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.asking.mistake import Mistake, one_line
from foveate.asking.notes import notes
from foveate.engine.report import human_bytes
from foveate.engine.session import prune
from foveate.errors import UnsupportedError
from foveate.evaluation.plots import COLOURS, STYLE
from foveate.evaluation.proving import Proof, cannot_prove, prove
from foveate.evaluation.results import Results, Row

if TYPE_CHECKING:
    from foveate.asking.subject import Subject
    from foveate.asking.variant import Variant


def check(subject: Subject, *, steps: int, out: Path | None, as_json: bool = False) -> bool:
    """Prove every variant, print and write what was found; whether all of them hold. as_json: print the rows instead.

    Raises:
        Mistake: for a variant that cannot be proven, before anything runs.
    """
    for variant in subject.variants:
        if reason := cannot_prove(variant.methods):
            raise Mistake(reason)
        with _mistakes(variant):
            prune(subject.model, variant.methods).remove()
    results = Results(out, "check", {**subject.facts, "steps": steps}, keys=("method", "step"))
    console = Console()
    with results:
        for variant in subject.variants:
            if not results.find(method=variant.label, step=steps):
                with _mistakes(variant):
                    proof = prove(
                        subject.model, subject.asker.inputs, variant.methods, steps=steps, clips=subject.asker.clips
                    )
                for row in _rows(variant, proof, subject):
                    if not results.find(method=variant.label, step=row["step"]):
                        results.add(row)
        if results.due("difference.png"):
            plot(results.rows, results.folder / "difference.png")
    found = {v.label: [row for row in results.rows if row["method"] == v.label] for v in subject.variants}
    if as_json:
        print(results.to_json())
    elif len(found) == 1:
        (rows,) = found.values()
        console.print(_steps(rows), "", sep="\n")
    for label, rows in () if as_json else found.items():
        console.print(_verdict(label, rows), soft_wrap=True)
    notes().print(Text(results.outcome, style="dim"), soft_wrap=True)
    return all(row["equal"] for rows in found.values() for row in rows)


@contextmanager
def _mistakes(variant: Variant) -> Iterator[None]:
    try:
        yield
    except (UnsupportedError, ValueError) as error:  # e.g. a layer that this model lacks
        raise Mistake(f"{variant.label}: {one_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise Mistake(
            "out of memory: the reference has no fused attention; try a smaller picture, --device cpu, or "
            "--dtype bfloat16, which proves less"
        ) from error


def _rows(variant: Variant, proof: Proof, subject: Subject) -> list[Row]:
    decode = subject.processor.decode
    tokens, kept = (sum(column) for column in zip(*proof.report.images[0], strict=True))
    return [
        {
            "method": variant.label,
            "step": number,
            "token": step.token,
            "text": decode([step.token]),
            "reference_token": step.reference,
            "reference_text": decode([step.reference]),
            "difference": _finite(step.difference),
            "without_masking": _finite(step.unhidden),
            "limit": _finite(proof.tolerance),
            "dtype": str(proof.dtype).removeprefix("torch."),
            "equal": proof.holds,
            "blind": proof.blind,
            "image_tokens": tokens,
            "kept": kept,
            "kv_bytes": proof.report.kv_bytes,
            "kv_bytes_unpruned": proof.report.kv_bytes_unpruned,
            "memory_faults": "; ".join(proof.faults),
        }
        for number, step in enumerate(proof.steps, start=1)
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the differences by step: with masking, which proves, and without, which is what pruning changes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    floor = min((row["limit"] for row in rows if row["limit"]), default=1e-4) / 1000  # a logarithm has no zero
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        panel = figure.subplots()
        for number, label in enumerate(dict.fromkeys(row["method"] for row in rows)):
            own = [row for row in rows if row["method"] == label]
            colour, steps = COLOURS[number % len(COLOURS)], [row["step"] for row in own]
            for name, style in (("difference", "-"), ("without_masking", ":")):
                values = [math.nan if row[name] is None else max(row[name], floor) for row in own]
                panel.plot(steps, values, style, color=colour, marker="o", markersize=3, label=label * (style == "-"))
        limits = [row["limit"] for row in rows if row["limit"]]
        if limits:
            panel.axhline(max(limits), color="black", linewidth=0.8)
            panel.annotate("allowed for rounding", (1, max(limits)), (0, 3), textcoords="offset points", ha="right",
                           xycoords=("axes fraction", "data"), fontsize=8)  # fmt: skip
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("generated token")
        panel.set_ylabel("largest difference between the logits")
        panel.set_title("pruned model and reference; dotted: a reference that masks nothing", fontsize=10, loc="left")
        panel.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _steps(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("step", "right"), ("pruned", "left"), ("reference", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("max |difference|", justify="right")
    table.add_column("without masking", justify="right", style="dim")
    for row in rows:
        close = row["difference"] is not None and row["limit"] is not None and row["difference"] <= row["limit"]
        table.add_row(
            str(row["step"]),
            Text(repr(row["text"])),
            Text(repr(row["reference_text"]), style="" if row["token"] == row["reference_token"] else "yellow"),
            Text(_number(row["difference"]), style="" if close else "red"),
            _number(row["without_masking"]),
        )
    return table


def _verdict(label: str, rows: Sequence[Row]) -> Text:
    first = rows[0]
    differences = [row["difference"] for row in rows]
    worst = max(differences, key=lambda number: math.inf if number is None else number)
    close = worst is not None and first["limit"] is not None and worst <= first["limit"]
    relation = "within" if close else "above"
    limit = f"the {_number(first['limit'])} that is allowed for {first['dtype']} rounding"
    parts = [f"logits differ by at most {_number(worst)} in {len(rows)} steps, {relation} {limit}"]
    other = [str(row["step"]) for row in rows if row["token"] != row["reference_token"]]
    if not other:
        parts.append("all tokens agree")
    else:
        tie = " (a near tie)" if close else ""
        parts.append(f"tokens differ at step {', '.join(other[:5])}{', ...' if len(other) > 5 else ''}{tie}")
    if first["memory_faults"]:
        faults = first["memory_faults"].split("; ")
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        parts.append(f"memory is not what the report says: {faults[0]}{more}")
    else:
        held, full = human_bytes(first["kv_bytes"]), human_bytes(first["kv_bytes_unpruned"])
        parts.append(f"the KV cache holds {held} of {full}, as reported")
    verdict = ("equal", "bold green") if first["equal"] else ("NOT EQUAL", "bold red")
    text = Text.assemble((label, "bold"), ": ", verdict, ". ", "; ".join(parts), ".")
    if first["blind"] and first["equal"]:
        text.append(" " + _blindness(first), "yellow")
    elif first["dtype"] != "float32":
        doubt = "may hide a small mistake" if first["equal"] else "may add up to more in this model"
        text.append(f" {first['dtype']} rounding {doubt}: --dtype float32 tells.", "yellow")
    return text


def _blindness(row: Row) -> str:
    if row["kv_bytes"] == row["kv_bytes_unpruned"] and row["kept"] == row["image_tokens"]:
        return "Nothing was dropped, so there was nothing to prove."
    return (
        "But this proves little: a reference that masks nothing is as close. Use --dtype float32, more --steps, or a "
        "smaller --keep."
    )


def _number(number: Any) -> str:
    return "not finite" if number is None else "0" if number == 0 else f"{number:.1e}"
