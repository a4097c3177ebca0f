"""What the playground asks, without a page: methods that fit, answers, pictures, mistakes, visitors at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from PIL import Image

import foveate
from foveate import glimpse
from foveate.asking.mistake import Mistake
from foveate.asking.pictures import DIM
from foveate.evaluation.maps import View
from foveate.evaluation.show import Layer
from foveate.layout import Tile
from foveate.playground import drawing
from foveate.playground.answers import as_html
from foveate.playground.table import MOST_METHODS, Request, Table, open_files

FRAMES = [f"examples/clip/{number}.png" for number in range(1, 7)]
OWL = Request(["examples/demo.png"], "Where is the owl?", "glimpse", ["fopru"], 0.25, measure=False)
DOG = Request(FRAMES, "Which way does the dog move?", "glimpse-video", ["divprune"], 0.5, one_clip=True, measure=False)


@pytest.fixture(scope="module")
def table():
    return Table()


def said(found):
    return [(answer.label, answer.text, answer.images, answer.kv_bytes) for answer in found.answers]


def test_a_table_begins_like_ask(table):
    loaded = table.loaded(table.usual)
    assert loaded.name == "glimpse" and loaded.usual == "divprune"
    assert loaded.offers["fopru"].keep == 0.25 and loaded.offers["plphp"].keep == 0.4


def test_only_what_fits_is_offered_with_its_summary(table):
    fits = {name: set(table.loaded(name).offers) for name in ("glimpse", "glimpse-cross", "glimpse-video")}
    assert fits["glimpse-cross"] == {"trimmed_llama", "random_cross"}
    assert {"fopru", "plphp", "sgl", "attention_predictor"} <= fits["glimpse"]
    assert not {"trimmed_llama", "quecc", "vistog"} & fits["glimpse"], "the weights of two are for a number of tokens"
    assert "evs" in fits["glimpse-video"]
    assert not {"sgl", "attention_predictor"} & fits["glimpse-video"], "no guide, no weights"
    assert table.loaded("glimpse").offers["csp"].summary == foveate.method_class("csp").summary


def test_answers_stand_beside_the_untouched_model(table):
    found = table.ask(replace(OWL, methods=["plphp", "pages"], keep=0.4, measure=True))
    assert [answer.label for answer in found.answers] == ["untouched", "plphp keep 0.4", "pages keep 0.4"]
    assert {answer.text for answer in found.answers} == {"bottom left"}
    assert all(answer.first_token_s > 0 and answer.ms_per_token > 0 for answer in found.answers)
    html = as_html(found, table.loaded("glimpse"))
    for part in ("57 of 144", "\N{MINUS SIGN}60%", "of it", "first token", "per token", "glimpse, float32, cpu"):
        assert part in html
    assert html.count("<article>") == 3 and "medians" in html


def test_what_a_model_writes_is_no_html(table):
    found = table.ask(OWL)
    found.answers[1].text = "<script>alert(1)</script>"
    html = as_html(found, table.loaded("glimpse"))
    assert "<script>" not in html and "&lt;script&gt;" in html and "medians" not in html


def test_layers_and_heads_are_told_apart_where_they_differ(table):
    found = table.ask(replace(OWL, methods=["fopru", "plphp", "fastv"], keep=0.4))
    fopru, plphp, fastv = found.layers.values()
    assert not drawing.differ(fopru) and drawing.heads(fopru) == 1
    assert drawing.differ(plphp) and drawing.heads(plphp) == 2
    assert drawing.differ(fastv) and drawing.heads(fastv) == 1
    assert drawing.caption(fopru) == "Every layer keeps 57 of 144 image tokens; the others never reached it."
    assert drawing.caption(fastv, 0) == "Layer 0 keeps 144 of 144 image tokens."
    assert drawing.caption(plphp) == "The brighter a token, the more of 6 layers x 2 heads keep it."
    assert drawing.caption(plphp, 5, 1).startswith("Layer 5, head 1 keeps 57 of 144 image tokens; the others left")


def test_what_is_dropped_is_dark():
    first, second = torch.tensor([[True, False], [True, False]]), torch.tensor([[False, False], [True, False]])
    layers = [Layer(0, [first], False), Layer(1, [second], True)]
    tile = Tile(torch.arange(2), (1, 2), (0.0, 0.0, 1.0, 1.0))
    view = View(0, Image.new("RGB", (40, 20), (200, 200, 200)), (tile,))

    def cells(*chosen):
        drawn = drawing.draw([view], layers, *chosen)
        return [drawn.getpixel((x, 10))[0] / 200 for x in (10, 30)]

    assert cells(1, 1) == pytest.approx([1, DIM], abs=0.02)
    assert cells(1, 0) == pytest.approx([DIM, DIM], abs=0.02)
    assert cells(1) == pytest.approx([(1 + DIM) / 2, DIM], abs=0.02), "one of two heads"
    assert cells() == pytest.approx([(3 + DIM) / 4, DIM], abs=0.02), "three of four choices"


def test_frames_stand_in_rows_that_a_phone_can_show(table):
    found = table.ask(DOG)
    assert [answer.text for answer in found.answers] == ["right", "right"]
    assert found.answers[1].images == [(384, 192)] and len(found.shown) == 6
    drawn = drawing.draw(found.shown, found.layers["divprune keep 0.5"])
    assert drawn.size == (4 * 220 + 3 * drawing.GAP, 2 * 220 + drawing.GAP)


def test_visitors_at_once_get_what_they_get_alone(table):
    requests = [OWL, DOG, replace(OWL, methods=["csp", "sgl"]), replace(OWL, question="Describe the picture.")] * 2
    alone = [said(table.ask(request)) for request in requests[:4]] * 2
    with ThreadPoolExecutor(len(requests)) as visitors:
        assert [said(found) for found in visitors.map(table.ask, requests)] == alone


def test_without_the_lock_visitors_meet(table, monkeypatch):
    monkeypatch.setattr(table, "_lock", nullcontext())
    with ThreadPoolExecutor(2) as visitors:
        asked = [visitors.submit(table.ask, replace(OWL, methods=["csp"])) for _ in range(8)]
        assert any(isinstance(visit.exception(), Mistake) for visit in asked), "the test above sees nothing"


def test_a_mistake_leaves_the_model_as_it_was(table):
    with pytest.raises(Mistake, match="the question holds <image>"):
        table.ask(replace(OWL, question="What is <image>?"))
    assert said(table.ask(OWL))[1][1] == "bottom left"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    (folder / "text.png").write_text("no picture")
    (folder / "film.mp4").write_bytes(b"no film")
    return folder


MISTAKES = {
    "no picture": ({"files": []}, "no picture: drop one"),
    "no question": ({"question": " "}, "the question is empty"),
    "an endless question": ({"question": "What? " * 500}, "more than 2000 characters"),
    "no method": ({"methods": []}, "no method"),
    "many methods": ({"methods": ["fopru", "csp", "plphp", "pages"]}, f"at most {MOST_METHODS} methods"),
    "a method that does not fit": ({"methods": ["trimmed_llama"]}, "trimmed_llama does not fit glimpse"),
    "another model": ({"model": "owner/name"}, "owner/name is not on this table: choose one of glimpse"),
    "a keep of nothing": ({"keep": 0.0}, "fopru: keep"),
    "an endless answer": ({"max_new_tokens": 10_000}, "1 to 256 tokens"),
    "many pictures": ({"files": ["examples/demo.png"] * 33}, "33 files are more than 32"),
    "a bomb": ({"files": ["bomb.png"]}, "bomb.png has more than 89 million pixels"),
    "a text": ({"files": ["text.png"]}, "text.png holds no picture"),
    "a broken film": ({"files": ["film.mp4"]}, "film.mp4 is no film, or broken"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_without_the_folder_of_uploads(table, files, name):
    if "film" in name:
        pytest.importorskip("av")
    changes, says = MISTAKES[name]
    changes = {**changes}
    if "files" in changes:
        changes["files"] = [str(files / file) if (files / file).is_file() else file for file in changes["files"]]
    with pytest.raises(Mistake, match=says.replace("(", r"\(")) as raised:
        table.ask(replace(OWL, **changes))
    assert str(files) not in str(raised.value) and "\n" not in str(raised.value)


def test_a_model_that_is_none_is_refused_before_there_is_a_page(tmp_path):
    with pytest.raises(Mistake, match="no config"):
        Table(str(tmp_path))


def test_a_model_of_ones_own_stands_beside_the_built_in_ones():
    own = Table(str(glimpse.PATH))
    assert own.names[1:] == ["glimpse", "glimpse-cross", "glimpse-video"]
    loaded = own.loaded(own.usual)
    assert loaded.name == own.names[0] and "sgl" not in loaded.offers and loaded.threads == own.threads


def test_films_and_pictures_open_alike():
    pytest.importorskip("av")
    (clip,), (film,) = open_files(FRAMES, one_clip=True), open_files(["examples/clip.mp4"], one_clip=False)
    assert len(clip.frames) == len(film.frames) == len(open_files(FRAMES, one_clip=False)) == 6


def test_many_pictures_together_are_bounded(files):
    Image.new("L", (9000, 9000)).save(files / "large.png")
    assert open_files([str(files / "large.png")], one_clip=False)
    with pytest.raises(Mistake, match="the pictures have more than 89 million pixels"):
        open_files([str(files / "large.png")] * 2, one_clip=False)
