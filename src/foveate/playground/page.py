"""The page: what to ask on the left, the answers and the kept tokens on the right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from foveate.asking.clips import MAX_FRAMES, frames_of, is_clip
from foveate.asking.loading import GLIMPSE, GLIMPSE_VIDEO
from foveate.asking.mistake import Mistake, one_line
from foveate.asking.pictures import HEIGHT, scaled
from foveate.errors import UnsupportedError
from foveate.evaluation.show import Layer
from foveate.playground import drawing
from foveate.playground.answers import as_html, mistake_as_html
from foveate.playground.examples import Example, draw_examples
from foveate.playground.table import (
    FRAME,
    LONGEST_QUESTION,
    MOST_METHODS,
    MOST_TOKENS,
    Comparison,
    Loaded,
    Request,
    Table,
    open_files,
)

FORGET = 3600  # seconds after which uploads and drawings are deleted
ALL, LAYER = "all", "layer"  # whose choice is drawn: of all layers, of one; else of one of its heads
CSS = package_files(__package__).joinpath("page.css").read_text("utf-8")

Updates = dict[Any, Any]  # what becomes of each component


class Page:
    """Components and what they do. Nothing of a visitor stays here: `self.found` is of each visitor alone."""

    def __init__(self, table: Table, folder: Path) -> None:
        """folder: for the examples."""
        self.table = table
        self.examples = draw_examples(folder)
        with gr.Blocks(
            title="foveate playground", analytics_enabled=False, delete_cache=(FORGET, FORGET)
        ) as self.blocks:
            gr.Markdown(
                "# foveate playground\nAsk about a picture or a clip, and see which of its tokens a method keeps, what "
                "that saves, and what the untouched model says."
            )
            self.found = gr.State(None, time_to_live=FORGET)
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._place_questions(table.loaded(table.usual))
                with gr.Column(scale=3, min_width=320):
                    self._place_answers()
            self._listen()

    # -- what is where ------------------------------------------------------------------------------------------------

    def _place_questions(self, loaded: Loaded) -> None:
        self.files = gr.File(label="pictures, or a film", file_count="multiple", height=140)
        with gr.Row():
            self.picture = gr.Button("an example picture", size="sm", min_width=120)
            self.clip = gr.Button("an example clip", size="sm", min_width=120)
        self.one_clip = gr.Checkbox(label="the pictures are the frames of one clip")
        self.question = gr.Textbox(
            label="question", placeholder="What is in the picture?", max_length=LONGEST_QUESTION, lines=1
        )
        self.model = gr.Dropdown(self.table.names, value=loaded.name, label="model")
        self.methods = gr.CheckboxGroup(
            _choices(loaded), value=[loaded.usual], label=f"methods, up to {MOST_METHODS}", elem_classes="methods"
        )
        self.keep = gr.Slider(
            0.01,
            1.0,
            loaded.offers[loaded.usual].keep,
            step=0.01,
            label="keep",
            info="the fraction of each image's tokens that stays",
        )
        with gr.Accordion("more", open=False):
            self.longest = gr.Slider(1, MOST_TOKENS, 64, step=1, label="longest answer, in tokens")
            self.measure = gr.Checkbox(True, label="measure times")
        self.button = gr.Button("Ask", variant="primary")

    def _place_answers(self) -> None:
        hint = '<p class="quiet">Drop a picture, or take an example, and ask.</p>'
        self.answers = gr.HTML(hint, elem_id="answers", padding=False)
        with gr.Row():
            self.seen_part, self.seen = _picture("what the model sees")
            self.kept_part, self.kept = _picture("what stays")
        self.caption = gr.HTML("", elem_id="caption", padding=False)
        with gr.Group(visible=False) as self.closer:
            self.label = gr.Radio([], label="method")
            self.layer = gr.Slider(0, 1, 0, step=1, label="layer")
            self.whose = gr.Dropdown([], label="what is kept by")

    def _listen(self) -> None:
        kept = [self.kept, self.caption]
        chosen = [self.found, self.label, self.layer, self.whose]
        # Several at once, so that none of these waits for a slow one of another visitor.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4}
        for button, example in zip((self.picture, self.clip), self.examples, strict=True):
            button.click(
                lambda example=example: self._take(example), None, [self.files, self.question, self.one_clip], **quiet
            )
        shown = [self.files, self.one_clip, self.model]
        for changed in (self.files, self.one_clip):
            changed.change(self.look, shown, [self.answers, self.seen, *self._parts(), self.caption], **quiet)
            changed.change(self.fitting_model, shown, self.model, **quiet)
        asked = [self.model, self.methods, self.keep]
        self.model.change(self.offer, asked, [self.methods, self.keep], **quiet)
        self.methods.change(self.usual_keep, asked, self.keep, **quiet)
        gr.on(
            [self.button.click, self.question.submit],
            self.ask,
            [self.files, self.question, *asked, self.one_clip, self.longest, self.measure],
            [self.found, self.answers, self.seen, *self._parts(), self.label, self.layer, self.whose, *kept],
            api_name="ask",
            show_progress_on=self.answers,
        )
        self.label.input(self.choose, [self.found, self.label], [self.layer, self.whose, *kept], **quiet)
        latest = {**quiet, "trigger_mode": "always_last"}
        self.layer.input(self.look_at_layer, chosen, [self.whose, *kept], **latest)
        self.whose.input(self.draw, chosen, kept, **latest)

    # -- what happens -------------------------------------------------------------------------------------------------

    def _take(self, example: Example) -> tuple[list[str], str, bool]:
        return example.files, example.question, example.one_clip

    def fitting_model(self, files: list[str] | None, one_clip: bool, model: str) -> Any:
        """Of the built-in models, the one that sees what is shown; any other stays."""
        if model not in (GLIMPSE, GLIMPSE_VIDEO) or not files:
            return gr.skip()
        return GLIMPSE_VIDEO if one_clip or any(map(is_clip, files)) else GLIMPSE

    def offer(self, name: str, methods: list[str], keep: float) -> tuple[Any, float]:
        """The methods that fit a model; of those that were chosen the ones that do, or its usual one."""
        try:
            loaded = self.table.loaded(name)
        except Mistake as error:
            raise gr.Error(str(error), print_exception=False) from error
        left = [method for method in methods if method in loaded.offers]
        keep = keep if left else loaded.offers[loaded.usual].keep
        return gr.update(choices=_choices(loaded), value=left or [loaded.usual]), keep

    def usual_keep(self, model: str, methods: list[str], keep: float) -> float:
        """What the only chosen method keeps where nobody says; beside others, what was asked for."""
        offers = self.table.loaded(model).offers
        return offers[methods[0]].keep if len(methods) == 1 and methods[0] in offers else keep

    def look(self, files: list[str] | None, one_clip: bool, model: str) -> Updates:
        """What was dropped; films are opened when they are asked about."""
        updates = {**self._nothing(), self.answers: ""}
        pictures = [file for file in files or [] if not is_clip(file)]
        if pictures and len(pictures) == len(files or []):
            try:
                shown = open_files(pictures, one_clip)
            except Mistake as error:
                return {**updates, self.answers: mistake_as_html(str(error))}
            updates |= {self.seen: _preview(shown), self.seen_part: gr.update(visible=True)}
        return updates

    def ask(
        self,
        files: list[str] | None,
        question: str,
        model: str,
        methods: list[str],
        keep: float,
        one_clip: bool,
        longest: float,
        measure: bool,
    ) -> Updates:
        """All answers; a mistake in their place."""
        # The slider sends 1.0 as 1, which would be one token.
        request = Request(files or [], question, model, methods, float(keep), one_clip, int(longest), measure)
        try:
            found = self.table.ask(request)
            answers = as_html(found, self.table.loaded(model))
        except (Mistake, UnsupportedError) as error:
            return {**self._nothing(), self.found: None, self.answers: mistake_as_html(one_line(error))}
        except torch.OutOfMemoryError:
            sentence = "the device has too little memory for this: give a smaller picture, or fewer"
            return {**self._nothing(), self.found: None, self.answers: mistake_as_html(sentence)}
        first = next(iter(found.layers))
        layers = found.layers[first]
        several = len(found.layers) > 1
        return {
            self.found: found,
            self.answers: answers,
            self.seen: drawing.grid([view.picture for view in found.shown]),
            self.seen_part: gr.update(visible=True),
            self.kept_part: gr.update(visible=True),
            self.closer: gr.update(visible=any(_differ(layers) for layers in found.layers.values()) or several),
            self.label: gr.update(choices=list(found.layers), value=first, visible=several),
            **self._controls(layers),
            self.kept: drawing.draw(found.shown, layers),
            self.caption: _caption(layers),
        }

    def choose(self, found: Comparison | None, label: str) -> Updates:
        """Look at another method."""
        if found is None:
            return {self.caption: _forgotten()}
        layers = found.layers[label]
        return {
            **self._controls(layers),
            self.kept: drawing.draw(found.shown, layers),
            self.caption: _caption(layers),
        }

    def look_at_layer(self, found: Comparison | None, label: str, layer: float, whose: str) -> Updates:
        """Look at another layer: at it alone, even if all were looked at."""
        whose = LAYER if whose == ALL else whose
        return {self.whose: whose, **self.draw(found, label, layer, whose)}

    def draw(self, found: Comparison | None, label: str, layer: float, whose: str) -> Updates:
        """Draw what was chosen of a method's layers and heads."""
        if found is None:
            return {self.caption: _forgotten()}
        layers = found.layers[label]
        at = None if whose == ALL else int(layer)
        head = None if whose in (ALL, LAYER) else int(whose)
        return {self.kept: drawing.draw(found.shown, layers, at, head), self.caption: _caption(layers, at, head)}

    def _controls(self, layers: Sequence[Layer]) -> Updates:
        """A slider and a choice, where a method differs by layers and heads."""
        heads = drawing.heads(layers)
        choices = [("all layers" if heads == 1 else "all layers and heads", ALL)]
        choices.append(("this layer" if heads == 1 else "all heads of this layer", LAYER))
        choices += [(f"head {head} of this layer", str(head)) for head in range(heads) if heads > 1]
        last = len(layers) - 1
        return {
            self.layer: gr.update(maximum=last, value=last, visible=drawing.differ(layers)),
            self.whose: gr.update(choices=choices, value=ALL, visible=_differ(layers)),
        }

    def _parts(self) -> list[Any]:
        return [self.seen_part, self.kept_part, self.closer]

    def _nothing(self) -> Updates:
        return {**{part: gr.update(visible=False) for part in self._parts()}, self.caption: ""}


def _choices(loaded: Loaded) -> list[tuple[str, str]]:
    """Each method with its summary: the usual one first, blind ones last."""
    offers = sorted(loaded.offers.values(), key=lambda o: (o.name != loaded.usual, o.summary.startswith("baseline")))
    return [(f"{offer.name}: {offer.summary}", offer.name) for offer in offers]


def _picture(label: str) -> tuple[gr.Column, gr.Image]:
    """A picture under its name, which gradio's own label would hide a corner of, and the column that shows both."""
    with gr.Column(visible=False, min_width=280, elem_classes="picture") as part:
        gr.HTML(f'<p class="quiet">{label}</p>', padding=False)
        return part, gr.Image(show_label=False, alt_text=label, format="png", interactive=False, buttons=["fullscreen"])


def _preview(shown: Sequence[Any]) -> Any:
    frames = [frame for one in shown for frame in frames_of(one)][:MAX_FRAMES]
    return drawing.grid([scaled(frame, HEIGHT if len(frames) == 1 else FRAME) for frame in frames])


def _differ(layers: Sequence[Layer]) -> bool:
    return drawing.differ(layers) or drawing.heads(layers) > 1


def _caption(layers: Sequence[Layer], layer: int | None = None, head: int | None = None) -> str:
    return f'<p class="quiet">{escape(drawing.caption(layers, layer, head))}</p>'


def _forgotten() -> str:
    return mistake_as_html("this answer was forgotten after an hour: ask again")
