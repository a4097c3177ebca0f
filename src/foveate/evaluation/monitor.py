"""`foveate calibrate --monitor`: whether a certificate still holds on requests that came later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from foveate.asking.loading import GLIMPSE, built_in, check_dtype, hush, load, resolve_device
from foveate.asking.mistake import Mistake, one_line
from foveate.engine.certified import rungs_of
from foveate.errors import UnsupportedError
from foveate.methods.method import read_certificate

from .accuracy import progress_bar
from .calibrate_questions import Asked, Said
from .guarantees import Rule, binomial_p, evidence
from .losses import find_loss
from .policies import climb
from .questions import from_folder
from .search_questions import Memory
from .workplace import known_family, own_questions, usable

if TYPE_CHECKING:
    from .calibrate_options import Options

FIRST = 800_000  # of glimpse's questions
ALARM = 20.0  # the evidence at which to alarm: once in 20 streams that are as promised, however long


@dataclass(frozen=True)
class Seen:
    """What a watch saw.

    at: after which request it alarmed, from 1 on. p: exact, of a risk within what is promised, were this all that is
    ever looked at; None for losses that are no errors.
    """

    risk: float
    requests: int
    lost: float
    evidence: float
    at: int | None
    p: float | None

    @property
    def alarm(self) -> bool:
        """Whether the promise is broken."""
        return self.at is not None

    def sentences(self) -> list[str]:
        """What the user is told."""
        share = f"{self.lost:g} of {self.requests} requests differ, {100 * self.lost / self.requests:.1f} %"
        lines = [f"{share}, where the certificate allows {100 * self.risk:g} %"]
        if self.p is not None:
            lines.append(f"looked at once, so many errors have a probability of {self.p:.2g} if the promise holds")
        if self.alarm:
            lines.append(
                f"ALARM after request {self.at}: these requests are not like those of the calibration, and the "
                "certificate does not hold for them; serve untouched, and calibrate on new questions"
            )
        else:
            lines.append(
                f"no alarm: the evidence against the promise is {self.evidence:.2g}, an alarm begins at {ALARM:g}"
            )
        return lines


def look(losses: Sequence[float], risk: float, *, binary: bool) -> Seen:
    """Watch losses in the order in which they came. binary: whether they are 0 and 1."""
    wealth = evidence(losses, risk)
    alarms = np.flatnonzero(wealth >= ALARM)
    total = float(sum(losses))
    # P(Bin >= errors), by the other tail.
    p = 1 - float(binomial_p(total - 1, len(losses), risk)) if binary and total > 0 else None
    return Seen(risk, len(losses), total, float(wealth[-1]), int(alarms[0]) + 1 if len(alarms) else None, p)


def watch(path: Path, options: Options, console: Console) -> Seen:
    """Look whether the certificate in a file holds on `options.data`: answers that were noted, or new questions.

    Raises:
        Mistake: for what the user got wrong.
    """
    try:
        promised = read_certificate(path)
    except (OSError, ValueError) as error:
        raise Mistake(f"--monitor {path}: {one_line(error)}") from error
    if promised is None:
        raise Mistake(f"--monitor {path} is no certificate: make one with foveate calibrate --out {path}")
    loss = find_loss(str(promised["loss"]))
    Rule("binomial", 0.5, 0.5).p(0, 1)  # without scipy, now
    if options.data is not None and Path(options.data).is_file():
        pairs = _noted(Path(options.data))
    else:
        pairs = _asked(path, promised, options, console)
    losses = [loss(said, whole) for said, whole in pairs]
    return look(losses, float(promised["alpha"]), binary=all(value in (0, 1) for value in losses))


def _noted(path: Path) -> list[tuple[str, str]]:
    """Both answers to each request, in the order in which they came, from lines {"pruned": ..., "untouched": ...}."""
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise Mistake(f"--data {path}: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pruned, untouched = row["pruned"], row["untouched"]
        except (ValueError, LookupError, TypeError, RecursionError):
            pruned = untouched = None
        if not isinstance(pruned, str) or not isinstance(untouched, str):
            raise Mistake(f'--data {path}, line {number}: write {{"pruned": "one answer", "untouched": "the other"}}')
        pairs.append((pruned, untouched))
    if not pairs:
        raise Mistake(f"--data {path} is empty: note both answers of some requests there")
    return pairs


def _asked(path: Path, promised: dict[str, Any], options: Options, console: Console) -> list[tuple[str, str]]:
    """What is said to new questions under the certificate, and by the untouched model."""
    check_dtype(options.dtype)
    hush()
    with console.status("loading, and preparing the questions"):
        source, dtype = built_in(options.model, options.dtype)
        config, _ = known_family(source)
        if options.data in (None, GLIMPSE):
            items = own_questions(options.model, options.data)[1](options.count, FIRST)
        else:
            assert options.data is not None
            items = from_folder(options.data, labelled=False)[0]
        model, processor = load(source, config, device=resolve_device(options.device), dtype=dtype, attn=options.attn)
        batches = usable(processor, items, options.batch_size, [])
    asked = Asked(model, processor, batches, Memory(), int(promised["max_new_tokens"]))
    rungs = rungs_of(path)
    with progress_bar(console) as progress:
        bar = progress.add_task("watching", total=(1 + len(rungs)) * len(batches))
        asked.advance = lambda: progress.advance(bar)
        try:
            columns = [[said for said in asked.ask(rung) if said] for rung in rungs]
        except (UnsupportedError, ValueError) as error:
            raise Mistake(one_line(error)) from error
        whole = asked.ask(None)
    said: Sequence[Said] = columns[0]
    if promised.get("policy") == "cascade":
        said, _ = climb(columns, whole, float(promised["sure"]))
    return [(one.text, other.text) for one, other in zip(said, whole, strict=True) if other]
