"""A new place is a class of its own and one entry in PLACES: the engine asks it, whatever it is for."""

from __future__ import annotations

import pytest
import tiny
import torch
from cases import PLACES as CASES
from cases import prune

import foveate
from foveate.engine import session
from foveate.engine.places import PLACES, Action, Place


class Counter(Place):
    """Does nothing but count."""

    made: list[Counter] = []  # noqa: RUF012

    def __init__(self, target, outcome):
        super().__init__(target, outcome)
        self.layers, self.attentions, self.passes, self.reports = [], [], 0, 0
        Counter.made.append(self)

    @classmethod
    def of(cls, target, methods, outcome):
        return cls(target, outcome)

    def act(self, forward):
        return Count(self)

    def tell(self, report):
        self.reports += 1


class Count(Action):
    def __init__(self, place):
        self.place = place

    def entering(self, index, hidden):
        self.place.layers.append((index, hidden.shape[1]))

    def attends(self, attention):
        return True

    def attend(self, attention, run):
        self.place.attentions.append((attention.index, attention.query.shape[2]))
        return run(attention)

    def finish(self):
        self.place.passes += 1


@pytest.mark.parametrize(("family", "name"), CASES)
@torch.no_grad()
def test_a_place_needs_nothing_but_an_entry(family, name, monkeypatch):
    batch, model = tiny.inputs(family), tiny.build(family)
    with prune(model, name):
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(session, "PLACES", (*PLACES, Counter))
    with prune(model, name) as pruned:
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), expected)
    counter, depth = Counter.made.pop(), len(model.model.language_model.layers)
    assert [index for index, _ in counter.layers] == list(range(depth)), "in front of the prompt's layers only"
    assert [index for index, _ in counter.attentions] == 3 * list(range(depth)), "around every attention"
    assert counter.passes == 3 and counter.reports == 1
    rows = [rows for _, rows in counter.layers]
    if name in ("fopru_rank", "fastv"):
        held = [layer.kept_length for layer in pruned.report.layers]
        assert rows == held and rows[-1] < batch["input_ids"].shape[1]


def test_a_place_can_refuse_and_stand_aside(monkeypatch):
    class Picky(Counter):
        def refuse(self, call):
            if call.arguments["input_ids"].shape[1] == 1:
                raise foveate.UnsupportedError("no steps")

    class Aside(Counter):
        def admits(self, call):
            return call.brings_images

    batch, model = tiny.inputs("llava"), tiny.build("llava")
    words = batch["input_ids"][:, :2]
    for kind, passes in ((Picky, 2), (Aside, 1)):
        monkeypatch.setattr(session, "PLACES", (*PLACES, kind))
        with foveate.prune(model, "fopru"):
            model(**batch)
            model(input_ids=words)
            if kind is Picky:
                with pytest.raises(foveate.UnsupportedError, match="no steps"):
                    model(input_ids=words[:, :1])
        assert Counter.made.pop().passes == passes
