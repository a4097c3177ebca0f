"""Answers and what they cost, beside each other, as HTML."""

from __future__ import annotations

from functools import cache
from html import escape
from importlib.resources import files

from jinja2 import Environment, Template

from foveate.asking.asker import RUNS, TIMED_TOKENS, Answer
from foveate.engine.report import human_bytes
from foveate.playground.table import Comparison, Loaded


def as_html(comparison: Comparison, loaded: Loaded) -> str:
    """A card for each answer, with what changed against the untouched model."""
    untouched = comparison.answers[0]
    cards = [
        {"label": a.label, "text": a.text, "figures": _figures(a, untouched, comparison.read_in_a_step.get(a.label))}
        for a in comparison.answers
    ]
    device, dtype = loaded.model.device, str(loaded.model.dtype).removeprefix("torch.")
    note = f"{loaded.name}, {dtype}, {device}"
    if untouched.first_token_s is not None:
        note += f"; times: medians of {RUNS} runs in turn, {TIMED_TOKENS} tokens each, after a warm-up"
    return _template().render(answers=cards, note=note)


def mistake_as_html(sentence: str) -> str:
    """What a visitor can put right."""
    return f'<p class="mistake" role="alert">{escape(sentence)}</p>'


def _figures(answer: Answer, untouched: Answer, read: float | None) -> list[tuple[str, str, str]]:
    """Name, value, and the change against the untouched model."""
    kept, tokens = (sum(column) for column in zip(*((kept, n) for n, kept in answer.images), strict=True))
    rows: list[tuple[str, str, float | None, float | None]] = [
        ("image tokens", f"{kept} of {tokens}", kept, tokens),
        ("KV cache", human_bytes(answer.kv_bytes), answer.kv_bytes, untouched.kv_bytes),
    ]
    if read is not None:
        rows.append(("read in a step", f"{read:.0%} of it", None, None))
    if answer.first_token_s is not None and answer.ms_per_token is not None:
        first, each = 1000 * answer.first_token_s, answer.ms_per_token
        whole = 1000 * untouched.first_token_s if untouched.first_token_s else None
        rows.append(("first token", f"{first:.1f} ms", first, whole))
        rows.append(("per token", f"{each:.2f} ms", each, untouched.ms_per_token))
    return [(name, value, _change(number, before) if answer.variant else "") for name, value, number, before in rows]


def _change(number: float | None, before: float | None) -> str:
    return f"{number / before - 1:+.0%}".replace("-", "\N{MINUS SIGN}") if number is not None and before else ""


@cache
def _template() -> Template:
    text = files(__package__).joinpath("answers.html").read_text("utf-8")
    return Environment(autoescape=True).from_string(text)
