"""The tasks of lmms-eval: every variant in a process of its own, with foveate's model for lmms-eval."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from foveate.asking.loading import GLIMPSE, built_in, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.options import options_in
from foveate.asking.subject import fingerprints, option_files
from foveate.asking.variant import Variant
from foveate.methods.grammar import parse_method

from .accuracy import UNTOUCHED
from .plans import Plan
from .results import Results, Row
from .workplace import device_name, known_family

# filelock 4 lacks what lmms-eval 0.7.3 imports of it.
MISSING = (
    "lmms-eval is not installed here: pip install lmms-eval==0.7.3 'filelock<4' (without a GPU see docs/measuring.md)"
)


def installed() -> bool:
    """Whether there is an lmms-eval to run."""
    return find_spec("lmms_eval") is not None


def run(plan: Plan, out: Path, *, device: str, console: Console) -> list[str]:
    """Ask the tasks of the untouched model and every variant, a row in the results `out` for each.

    What lmms-eval writes and prints stays in `out`/lmms_eval. Returns a line for each variant that failed.
    """
    table, model = plan.lmms_eval, plan.model
    assert table is not None and model is not None
    device = resolve_device(device)
    config, family = known_family(built_in(model, plan.dtype)[0])
    chosen = plan.variants(family.places, config.model_type)
    settings: Row = {"model": model, "tasks": table.tasks, "limit": table.limit, "batch_size": table.batch_size}
    settings |= {"attn": plan.attn, "dtype": "bfloat16", "device": device_name(device), "lmms_eval": _version()}
    settings |= {**fingerprints(model, None), **option_files(options_in(plan.text[0]))}
    failures = []
    with Results(out, "tasks", settings, keys=("method", "keep")) as results:
        try:
            for variant in (None, *chosen):
                name, keep = _names(variant)
                if results.find(method=name, keep=keep):
                    continue
                try:
                    with console.status(f"lmms-eval: {_title(variant)}"):
                        found = _ask(_command(plan, out, device, variant), _folder(out, variant))
                except Mistake as error:
                    failures.append(f"{_title(variant)}: {error}")
                    console.print(failures[-1], markup=False, highlight=False, soft_wrap=True)
                else:
                    results.add({"method": name, "keep": keep, **found})
                    said = ", ".join(f"{task} {value:.4g}" for task, value in found.items())
                    console.print(f"{_title(variant)}: {said}", markup=False, highlight=False, soft_wrap=True)
            results.complete = not failures
        except KeyboardInterrupt:
            line = f"stopped: {len(results.rows)} finished rows are in {out}; the same command goes on there"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise
    return failures


def commands(plan: Plan, out: Path, device: str) -> list[list[str]]:
    """What is run, the untouched model first."""
    return [["python", *_command(plan, out, device, variant)[1:]] for variant in (None, *plan.variants())]


def _command(plan: Plan, out: Path, device: str, variant: Variant | None) -> list[str]:
    table, model = plan.lmms_eval, plan.model
    assert table is not None and model is not None
    # lmms-eval's model knows glimpse by name, and no other that is built in.
    arguments = [f"pretrained={model if model == GLIMPSE else built_in(model, plan.dtype)[0]}"]
    if variant is not None:
        # Quotes keep commas together there; foveate's model takes them off.
        arguments.append(f'method="{variant.label}"' if "," in variant.label else f"method={variant.label}")
        if any("keep" not in part.options for part in parse_method(variant.label)):
            arguments.append(f"keep={variant.keep!r}")
    if plan.attn is not None:
        arguments.append(f"attn_implementation={plan.attn}")
    words = [sys.executable, "-m", "lmms_eval", "--model", "foveate", "--model_args", ",".join(arguments)]
    words += ["--tasks", ",".join(table.tasks), "--batch_size", str(table.batch_size)]
    words += [] if device == "auto" else ["--device", device]
    words += [] if table.limit is None else ["--limit", repr(table.limit)]
    words += [] if table.include_path is None else ["--include_path", table.include_path]
    return [*words, "--output_path", str(_folder(out, variant))]


def _ask(command: list[str], folder: Path) -> dict[str, float]:
    """The figures of one run, by task and metric.

    Raises:
        Mistake: where it failed, with its last line.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    files = sorted(folder.rglob("*results.json"))
    if status or not files:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((re.sub(r"\x1b\[\d*m", "", line) for line in reversed(lines) if line.strip()), "it printed nothing")
        raise Mistake(f"lmms-eval failed (see {log}): {one_line(ValueError(last))}")
    figures = {}
    for task, metrics in json.loads(files[-1].read_text(encoding="utf-8"))["results"].items():
        for metric, value in metrics.items():
            name, _, which = metric.partition(",")
            if type(value) not in (int, float) or not math.isfinite(value) or "_stderr" in name:
                continue
            figures[f"{task} {name}" + ("" if which in ("", "none") else f" ({which})")] = value
    if not figures:
        raise Mistake(f"lmms-eval gave no figure (see {folder})")
    return figures


def _names(variant: Variant | None) -> tuple[str, float | int | None]:
    return (variant.label, variant.keep) if variant else (UNTOUCHED, None)


def _title(variant: Variant | None) -> str:
    return f"{variant.label} keep={variant.keep}" if variant else UNTOUCHED


def _folder(out: Path, variant: Variant | None) -> Path:
    return out / "lmms_eval" / re.sub(r"[^\w.=+-]+", "-", _title(variant))


def _version() -> str | None:
    try:
        return metadata.version("lmms-eval")
    except metadata.PackageNotFoundError:
        return None
