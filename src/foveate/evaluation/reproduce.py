"""`foveate reproduce`: what a plan asks for, part by part, into one folder that goes on where it stopped."""

from __future__ import annotations

import gc
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from foveate.asking.mistake import Mistake
from foveate.asking.outputs import check_folder

from . import bench, evaluate, lmms_tasks
from .plans import PARTS, Plan
from .reproduce_report import Summary
from .results import read
from .workplace import Options

SEED = 0


def chosen_parts(plan: Plan, only: str | None) -> list[str]:
    """What of a plan is to run. only: what `--only` says.

    Raises:
        Mistake: for a part that there is not.
    """
    if only is None:
        return plan.parts
    names = list(dict.fromkeys(name.strip() for name in only.split(",")))
    for name in names:
        if name not in PARTS:
            raise Mistake(f"--only {only}: {name or 'nothing'} is no part: use {', '.join(PARTS)}")
        if name not in plan.parts:
            raise Mistake(f"--only {only}: {plan.name} has no {PARTS[name]}, so there is no {name} to run")
    if names == ["tasks"] and not lmms_tasks.installed():
        raise Mistake(f"--only {only}: {lmms_tasks.MISSING}")
    return [part for part in plan.parts if part in names]


def reproduce(plan: Plan, parts: Sequence[str], *, out: Path, device: str, console: Console) -> list[str]:
    """Run the parts of a plan into folders of their own in `out`; `summary.md` and `summary.json` beside them.

    The summary is of what is there, and written whatever ends the run. Returns a line for each row that is missing.
    """
    check_folder(out)
    lost: list[str] = []
    try:
        for part in parts:
            if part == "tasks" and not lmms_tasks.installed():
                _say(console, f"tasks are left out: {lmms_tasks.MISSING}")
                continue
            _say(console, f"{part}: {out / part}")
            if part == "eval":
                lost += evaluate.evaluate(_eval(plan, device), out=out / part, jobs=1, console=console)[1]
            elif part == "bench":
                fixed: dict[str, Any] = {"geometry": None, "padded": False, "image_tokens": None, "frames": None}
                lines = bench.bench(**_bench(plan, device), **fixed, out=out / part, console=console)[1]
                for line in lines:
                    _say(console, f"not measured: {line}")
                lost += lines
            else:
                lost += lmms_tasks.run(plan, out / part, device=device, console=console)
            _free()  # the next part, which may be another process, loads the model itself
    finally:
        summary = Summary.of(plan, out)
        if summary.rows:
            summary.write(out)
    return lost


def dry_run(plan: Plan, parts: Sequence[str], *, out: Path, device: str) -> dict[str, list[str]]:
    """For each part the commands that it stands for: the same folder takes the rows of either."""
    commands = {}
    for part in parts:
        if part == "tasks":
            there = lmms_tasks.commands(plan, out / part, device)
        else:
            options = asdict(_eval(plan, device)) if part == "eval" else _bench(plan, device)
            words = [
                word
                for name, value in options.items()
                if value is not None
                for word in (f"--{name.replace('_', '-')}", str(value))
            ]
            there = [["foveate", part, *words, "--out", str(out / part)]]
        commands[part] = [shlex.join(words) for words in there]
    return commands


def rows_there(out: Path, part: str) -> int:
    """How many rows an earlier run has left."""
    return len(read(out / part)[0]) if (out / part / "run.json").is_file() else 0


def _eval(plan: Plan, device: str) -> Options:
    assert plan.eval is not None and plan.model is not None
    methods, keep = plan.text
    return Options(
        model=plan.model,
        methods=methods,
        keep=keep,
        **asdict(plan.eval),
        seed=SEED,
        device=device,
        dtype=plan.dtype,
        attn=plan.attn,
        guide=None,
    )


def _bench(plan: Plan, device: str) -> dict[str, Any]:
    assert plan.bench is not None
    methods, keep = plan.text
    table = asdict(plan.bench)
    return {
        **{"model": plan.model, "methods": methods, "keep": keep, **table, "batch": str(table["batch"])},
        **{"seed": SEED, "device": device, "dtype": plan.dtype, "attn": plan.attn},
    }


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
