"""`foveate show`: which tokens every layer and head keeps, by what, and where they look: pictures and one page."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from rich.console import Console
from rich.text import Text

from foveate.asking.clips import frames_of
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.notes import notes
from foveate.asking.pictures import crop_as_seen, scaled
from foveate.errors import UnsupportedError
from foveate.evaluation.attention import last_token_attention
from foveate.evaluation.maps import View, draw_heat, draw_rank, draw_share, fitted, palette, panel, sheet, views
from foveate.evaluation.ranks import Ranked, decided, ranked
from foveate.evaluation.results import Results, write

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.asking.subject import Subject
    from foveate.asking.variant import Variant
    from foveate.engine.report import PruneReport

ACROSS = 6  # panels in a row, where a method has one choice a layer
BY_RANK = "from the last to the first"
UNASKED = 255  # the byte of a token that a method was not asked about


@dataclass(frozen=True)
class Layer:
    """What one layer that reads the images does with them.

    kept: for each image bool (1 | kv_heads, n). freed: whether it saw the others before it lost them.
    """

    index: int
    kept: list[Tensor]
    freed: bool

    @property
    def heads(self) -> int:
        """How many heads choose for themselves; 1 where they agree."""
        return max(k.shape[0] for k in self.kept)

    @property
    def count(self) -> float:
        """Tokens kept, mean over heads."""
        return sum(float(k.sum(-1).float().mean()) for k in self.kept)


@dataclass(frozen=True)
class Shown:
    """A variant's answer and layers, and by what its methods ranked tokens."""

    label: str
    answer: str
    summary: str
    layers: list[Layer]
    ranked: list[Ranked]


def show(subject: Subject, *, out: Path | None) -> None:
    """Ask under every variant, look at the untouched model's attention, and write pictures, a page and rows."""
    for variant in subject.variants:
        _under(subject, variant, ask=False)
    settings = {**subject.facts, "max_new_tokens": subject.asker.max_new_tokens}
    results = Results(out, "show", settings, keys=("method", "layer", "head", "image"))
    found = [_under(subject, variant) for variant in subject.variants]
    reports = [report for _, report in found]
    images = reports[0].image_tokens[0]
    crop = subject.processor.image_processor
    seen = [[crop_as_seen(frame, crop) for frame in frames_of(one)] for one in subject.shown]
    shown = views(seen, [image.tiles for image in images])
    shows = [
        Shown(variant.label, answer, str(report), layers_of(report), ranked(report))
        for variant, (answer, report) in zip(subject.variants, found, strict=True)
    ]
    rows = last_token_attention(subject.model, subject.asker.inputs)
    looks = {
        layer.index: [rows[layer.index][:, image.positions.cpu()] for image in images] for layer in shows[0].layers
    }
    with results:
        for each in shows:
            _add_rows(results, each, looks)
        question = subject.settings["question"]
        for each in shows:
            if results.due(name := f"kept-{_slug(each.label)}.png"):
                kept_sheet(each, shown, question).save(results.folder / name)
            if each.ranked and results.due(name := f"ranks-{_slug(each.label)}.png"):
                ranks_sheet(each, shown, question).save(results.folder / name)
        if results.due("attention.png"):
            attention_sheet(looks, shown, question).save(results.folder / "attention.png")
        # Always: it shows the methods of this command, and the folder may hold more.
        renewed = write(results.folder / "show.html", page(subject.settings, shown, shows, looks))
    console = Console()
    for each in shows:
        console.print(Text.assemble((each.label, "bold"), ": ", each.answer), soft_wrap=True)
        console.print(Text(each.summary, style="dim"), soft_wrap=True)
    outcome = f"wrote {results.folder}" if renewed else results.outcome
    notes().print(Text(f"{outcome}/show.html", style="dim"), soft_wrap=True)


def _under(subject: Subject, variant: Variant, *, ask: bool = True) -> Any:
    """The answer under a variant and its report; without `ask` only whether it may be pruned so."""
    try:
        with subject.asker.under(variant.methods, record=True) as pruned:
            found = (subject.asker.text(), pruned.report) if ask else None
    except (UnsupportedError, ValueError) as error:
        raise Mistake(f"{variant.label}: {one_line(error)}") from error
    if found and found[1] is None:
        raise Mistake(f"{variant.label}: the guide answered alone, so nothing was pruned: leave exit_threshold out")
    return found


def layers_of(report: PruneReport) -> list[Layer]:
    """The layers that attend to the images: the cross-attention layers where there are any."""
    assert report.image_tokens is not None
    cross = [layer for layer in report.layers if layer.kind == "cross"]
    layers = []
    for layer in cross or [layer for layer in report.layers if layer.kind == "self"]:
        assert layer.kept is not None
        kept = [layer.kept[0][:, image.positions.to(layer.kept.device)].cpu() for image in report.image_tokens[0]]
        layers.append(Layer(layer.index, kept, layer.since == "decode"))
    return layers


def _add_rows(results: Results, each: Shown, looks: dict[int, list[Tensor]]) -> None:
    for layer in each.layers:
        for image, (kept, look) in enumerate(zip(layer.kept, looks[layer.index], strict=True)):
            for head in range(len(kept)):
                keys: dict[str, Any] = {
                    "method": each.label,
                    "layer": layer.index,
                    "head": head if len(kept) > 1 else None,
                    "image": image,
                }
                attention = look[head] if len(kept) > 1 else look.mean(0)
                if not results.find(**keys):
                    results.add(
                        {
                            **keys,
                            "tokens": kept.shape[-1],
                            "kept": int(kept[head].sum()),
                            "since": "decode" if layer.freed else "prefill",
                            "attention_image": round(float(attention.sum()), 6),
                            "attention_kept": round(float(attention[kept[head]].sum()), 6),
                        }
                    )


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


# -- pictures ---------------------------------------------------------------------------------------------------------


def kept_sheet(each: Shown, shown: Sequence[View], question: str) -> Image.Image:
    """What stays: a panel for every choice; layers in a row that choose alike share one."""
    runs = [list(run) for _, run in itertools.groupby(each.layers, key=lambda layer: [k.tolist() for k in layer.kept])]
    heads = max(layer.heads for layer in each.layers)
    tokens = sum(k.shape[-1] for k in each.layers[0].kept)
    title = f"{each.label}: what stays of {tokens} image tokens\n{question}  {each.answer}"
    if heads == 1:
        shown = fitted(shown, min(ACROSS, len(runs)))
        cells = [(f"{_names(run)}: {run[0].count:.4g} stay", panel(shown, _shares(run[0]), draw_share)) for run in runs]
        return sheet(title, [("", cells[i : i + ACROSS]) for i in range(0, len(cells), ACROSS)])
    shown = fitted(shown, heads + 1)
    rows = []
    for number, run in enumerate(runs):
        drawn = [panel(shown, _shares(run[0]), draw_share)]
        for head in range(heads):
            values = [k[head if len(k) > 1 else 0].float() for k in run[0].kept]
            drawn.append(panel(shown, values, draw_share))
        rows.append(
            (f"{_names(run)}\n{run[0].count:.4g} stay", list(zip(_captions(heads, number), drawn, strict=True)))
        )
    return sheet(f"{title}\nall heads: the brighter, the more of them keep it", rows)


def ranks_sheet(each: Shown, shown: Sequence[View], question: str) -> Image.Image:
    """By what the methods ranked the tokens: a row for every choice."""
    heads = max(len(ranks) for choice in each.ranked for ranks in choice.ranks)
    several = len({choice.method for choice in each.ranked}) > 1
    shown, rows = fitted(shown, heads + (heads > 1)), []
    titled = next((number for number, choice in enumerate(each.ranked) if len(choice.ranks[0]) > 1), 0)
    for number, choice in enumerate(each.ranked):
        drawn = [panel(shown, [ranks.mean(0) for ranks in choice.ranks], draw_rank)]
        if heads > 1 and len(choice.ranks[0]) > 1:
            drawn += [panel(shown, [ranks[head] for ranks in choice.ranks], draw_rank) for head in range(heads)]
        name = f"{choice.method}\n{choice.at}" if several else choice.at
        captions = _captions(heads, number - titled)[: len(drawn)] if heads > 1 else [""]
        rows.append((name, list(zip(captions, drawn, strict=True))))
    return sheet(f"{each.label}: how it ranks the tokens that it was asked about\n{question}", rows, scale=BY_RANK)


def attention_sheet(looks: dict[int, list[Tensor]], shown: Sequence[View], question: str) -> Image.Image:
    """Where the untouched model looks when the prompt has been read: a row for every layer."""
    heads = next(iter(looks.values()))[0].shape[0]
    shown = fitted(shown, heads + 1)
    rows = []
    for number, (index, of_images) in enumerate(looks.items()):
        means = [values.mean(0) for values in of_images]
        drawn = [panel(shown, means, draw_heat)]
        drawn += [panel(shown, [values[head] for values in of_images], draw_heat) for head in range(heads)]
        name = f"layer {index}\n{sum(float(m.sum()) for m in means):.0%} on image"
        rows.append((name, list(zip(_captions(heads, number), drawn, strict=True))))
    title = f"attention of the prompt's last token in the untouched model\n{question}"
    return sheet(title, rows, scale="from none to the panel's most, by square roots")


def _names(run: Sequence[Layer]) -> str:
    first, last = run[0].index, run[-1].index
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def _captions(heads: int, row: int) -> list[str]:
    return ["", *[""] * heads] if row else ["all heads", *(f"head {head}" for head in range(heads))]


def _shares(layer: Layer) -> list[Tensor]:
    return [k.float().mean(0) for k in layer.kept]


# -- the page ---------------------------------------------------------------------------------------------------------


def page(
    settings: dict[str, Any], shown: Sequence[View], shows: Sequence[Shown], looks: dict[int, list[Tensor]]
) -> str:
    """One HTML file that needs nothing else: sliders over layers and heads, pictures and masks inside."""
    pictures = {(view.image, id(view.picture)): view.picture for view in shown}
    at = {key: number for number, key in enumerate(pictures)}
    data = {
        "pictures": [_data_uri(scaled(picture, 448)) for picture in pictures.values()],
        "views": [
            {
                "image": view.image,
                "picture": at[view.image, id(view.picture)],
                "name": view.name,
                "tiles": [{"box": tile.box, "grid": tile.grid, "index": tile.index.tolist()} for tile in view.tiles],
            }
            for view in shown
        ],
        "palette": _base64(palette()),
        "variants": [
            {
                "label": each.label,
                "answer": each.answer,
                "summary": each.summary,
                "layers": _frames(each),
                "ranked": [_ranked(choice) for choice in each.ranked],
            }
            for each in shows
        ],
        "attention": {index: [_heat(values) for values in of_images] for index, of_images in looks.items()},
    }
    template = Environment(autoescape=True).from_string(files(__package__).joinpath("show.html").read_text("utf-8"))
    # Inside a script element only this could end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.render(settings=settings, data=text)


def _frames(each: Shown) -> list[dict[str, Any]]:
    return [
        {
            "index": layer.index,
            "freed": layer.freed,
            "count": round(layer.count, 1),
            "tokens": sum(k.shape[-1] for k in layer.kept),
            "ranked": decided(each.ranked, layer.index),
            # For each image and head the tokens as bits, first token first.
            "kept": [[_base64(np.packbits(head.numpy()).tobytes()) for head in kept] for kept in layer.kept],
        }
        for layer in each.layers
    ]


def _ranked(choice: Ranked) -> dict[str, Any]:
    """For each image and head the ranks as bytes, the mean of all heads first where they differ."""

    def encoded(ranks: Tensor) -> str:
        return _base64((ranks * (UNASKED - 1)).round().nan_to_num(UNASKED).byte().numpy().tobytes())

    stacked = [[ranks.mean(0), *ranks] if len(ranks) > 1 else [ranks[0]] for ranks in choice.ranks]
    return {"method": choice.method, "at": choice.at, "ranks": [[encoded(r) for r in of_image] for of_image in stacked]}


def _heat(values: Tensor) -> dict[str, Any]:
    """Attention on one image by head, their mean first: bytes by square roots, and its share of the whole."""
    stacked = [values.mean(0), *values]
    heats = [((v / v.max().clamp(min=1e-30)).sqrt() * 255).round().byte().numpy().tobytes() for v in stacked]
    return {"heads": [_base64(heat) for heat in heats], "share": [round(float(v.sum()), 4) for v in stacked]}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{_base64(file.getvalue())}"
