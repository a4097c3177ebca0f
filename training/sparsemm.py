"""Finds a model's visual heads: those that, while an answer is written, look at what it names.

Nothing is trained. The model reads questions with their answers, and each head scores by how often its largest
attention lies on the image tokens where the answer is to be seen. Of glimpse's pictures, which are drawn, that place is
known; other models need pictures and boxes of the user's.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plugin
import torch
from lessons import IGNORE
from torch import Tensor

import foveate
from foveate.asking.mistake import Mistake
from foveate.engine.support import find_target
from foveate.evaluation.questions import FILE, Item, from_folder
from foveate.evaluation.rankings import Watch
from foveate.evaluation.results import run_script
from foveate.glimpse import HELDOUT_VERSION
from foveate.glimpse.drawing import coverage, render
from foveate.glimpse.facts import Fact, facts
from foveate.glimpse.scene import Scene, Thing, imagine
from foveate.methods.sparsemm import SparseMM, hits
from foveate.methods.tokens import LayerTokens
from foveate.methods.trained import WEIGHTS_NAME, write_plugin

FIRST = 850_000  # of glimpse's held-out seeds: no table, search or certificate takes those from here on
KINDS = ("what", "where", "colour", "number", "word", "describe")  # things are asked about whose place is known
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shown:
    """A question about one picture, and its answer piece by piece, each with the box of what it names, or None.

    A box is left, top, right and bottom, fractions of a side.
    """

    item: Item
    pieces: tuple[tuple[str, Box | None], ...]


def drawn(count: int) -> list[Shown]:
    """Questions about glimpse's pictures, all kinds in turn, each about a thing of which some patch is seen."""
    shown = []
    for number in range(count):
        rng, found = np.random.default_rng(HELDOUT_VERSION * 1_000_000 + FIRST + number), None
        while found is None:
            scene = imagine(rng)
            asked = [fact for fact in facts(scene, rng) if fact.kind == KINDS[number % len(KINDS)]]
            known = [(fact, _pieces(scene, fact)) for fact in asked]
            known = [(fact, pieces) for fact, pieces in known if any(box for _, box in pieces)]
            found = known[rng.integers(len(known))] if known else None
        fact, pieces = found
        shown.append(Shown(Item((render(scene),), fact.question, (fact.answer,), fact.kind), pieces))
    return shown


def _pieces(scene: Scene, fact: Fact) -> tuple[tuple[str, Box | None], ...]:
    """An answer, and where what it names is to be seen."""
    if fact.kind != "describe":
        return ((fact.answer, _box(scene, _about(scene, fact))),)
    clauses = zip(fact.answer.split(", "), scene.things, strict=True)
    return tuple((clause if i == 0 else f", {clause}", _box(scene, thing)) for i, (clause, thing) in enumerate(clauses))


def _about(scene: Scene, fact: Fact) -> Thing | None:
    """The one thing that a question is about; None for a place where nothing is."""
    return next(
        (
            thing
            for thing in scene.things
            if (fact.kind == thing.kind or fact.subject in (thing.kind, thing.name))
            or (fact.kind == "what" and fact.subject == thing.place)
        ),
        None,
    )


def _box(scene: Scene, thing: Thing | None) -> Box | None:
    """Around the patches on which a thing is seen."""
    patches = coverage(scene)
    rows, columns = np.nonzero(patches == (-2 if thing is None else scene.things.index(thing)))
    if not len(rows):
        return None
    side = len(patches)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return left / side, top / side, right / side, bottom / side


def given(options: argparse.Namespace) -> list[Shown]:
    """The questions of a folder that have a box.

    Raises:
        Mistake: where none has.
    """
    items, bad, _ = from_folder(options.data)
    rows = (options.data / FILE).read_text(encoding="utf-8-sig").splitlines()
    shown = []
    for item in items:
        box = json.loads(rows[(item.line or 1) - 1]).get("box")
        fits = isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in box)
        if fits and len(item.images) == 1 and not item.before and not item.shows_clip:
            shown.append(Shown(item, ((item.answers[0], tuple(box)),)))  # type: ignore[arg-type]
        else:
            bad.append((item.line or 0, "it needs one picture, one question, and its box"))
    for line, why in bad:
        print(f"{options.data}, line {line} is left out: {why}")
    if not shown:
        raise Mistake(
            f"{options.data} has no row with a box: write where the answer is to be seen, as fractions of the picture, "
            'such as "box": [0.1, 0.2, 0.4, 0.3] for left, top, right and bottom'
        )
    return shown[: options.count]


def visual_heads(model: Any, processor: Any, shown: Sequence[Shown], batch: int = 16) -> Tensor:
    """How often each head looks at what answers name while they are written: (layers, query heads), their sum 1.

    Raises:
        Mistake: where no head ever does.
    """
    host = find_target(model).host
    found = torch.zeros(host.depth, host.heads)
    for inputs, rows, boxes in batches(processor, shown, batch):
        rows, boxes = rows.to(host.device), boxes.to(host.device)
        watch = Watch(rank=looking(rows, boxes, found))
        with torch.no_grad(), foveate.prune(model, watch):
            # The answer counts as prompt, so that its rows can be read.
            model(**plugin.on_device(model, inputs), use_cache=True, logits_to_keep=1)
    if not found.sum():
        raise Mistake("no head looked at any of the boxes: are they left, top, right and bottom in [0, 1]?")
    return found / found.sum()


def batches(processor: Any, shown: Sequence[Shown], size: int) -> Iterator[tuple[plugin.Batch, Tensor, Tensor]]:
    """Model inputs of questions with their answers; the rows that write the answers, (batch, r), -1 at others; and the
    box of what each is about to name, (batch, r, 4), -1 where there is none."""
    special = torch.tensor(sorted(processor.tokenizer.all_special_ids))
    for start in range(0, len(shown), size):
        part = shown[start : start + size]
        inputs = plugin.encode(processor, [one.item for one in part])
        labels = inputs.pop("labels")
        written = (labels != IGNORE) & ~torch.isin(labels, special)
        front = int(written.any(0).int().argmax())
        rows = torch.arange(front, labels.shape[1]).expand(len(part), -1) - 1
        boxes = torch.full((*rows.shape, 4), -1.0)
        for own, one in zip(boxes, part, strict=True):
            told, end = "", 0
            for piece, box in one.pieces:
                told, begin = told + piece, end
                end = len(processor.tokenizer(told, add_special_tokens=False)["input_ids"])
                if box is not None:
                    own[begin:end] = torch.tensor(box)
        yield inputs, torch.where(written[:, front:], rows, -1), boxes


def looking(rows: Tensor, boxes: Tensor, found: Tensor) -> Callable[[LayerTokens], Tensor]:
    """Adds to what was found, (layers, heads), what a layer's heads look at in these rows."""

    def look(tokens: LayerTokens) -> Tensor:
        groups, keys = tokens.groups, tokens.key.shape[2]
        assert groups.centers is not None
        left, top, right, bottom = boxes[groups.row].unsqueeze(2).unbind(-1)  # (groups, r, 1) each
        down, across = groups.centers.unsqueeze(1).unbind(-1)
        inside = (left <= across) & (across <= right) & (top <= down) & (down <= bottom)
        inside = inside & (groups.present & (tokens.slots >= 0)).unsqueeze(1) & (rows[groups.row] >= 0).unsqueeze(-1)
        shows = torch.zeros(*rows.shape, keys + 1, dtype=torch.bool, device=rows.device)
        at = torch.where(inside, tokens.slots.unsqueeze(1), keys)
        shows[groups.row] = shows[groups.row].scatter(2, at, True)  # one picture a sample
        found[tokens.layer] += hits(tokens.attention(rows), shows[..., :-1]).sum(0).cpu()
        return tokens.last_attention().mean(1)

    return look


def measure(options: argparse.Namespace) -> Tensor:
    """Measures and writes the scores, and returns them."""
    model, processor = plugin.load(options)
    shown = drawn(options.count) if options.data is None else given(options)
    scores = visual_heads(model, processor, shown, options.batch)
    host = find_target(model).host
    write_plugin(options.out / WEIGHTS_NAME, SparseMM(), host.model_type, host.fingerprint(), {"heads": scores})
    ranked = scores.flatten().sort(descending=True).values
    half = int((ranked.cumsum(0) < 0.5).sum()) + 1
    print(f"{options.out / WEIGHTS_NAME}: {half} of {len(ranked)} heads have half of the hits of {len(shown)} answers")
    return scores


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = plugin.common(__doc__ or "", batch=16)
    parser.add_argument("--count", type=int, default=200, help="questions to measure on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_script(lambda: measure(parse()))
