"""`foveate show`: pictures and one page of what layers and heads keep and where they look."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate.asking.pictures import DIM
from foveate.asking.subject import Subject
from foveate.asking.variant import Variant
from foveate.commands.app import app
from foveate.engine.support import find_target
from foveate.evaluation.attention import last_token_attention
from foveate.evaluation.maps import draw_heat, draw_rank, draw_share, palette, views
from foveate.evaluation.ranks import Ranked, decided, ranked, ranks
from foveate.evaluation.show import show
from foveate.layout import Tile

PICTURE = "examples/demo.png"
QUESTION = "Where is the owl?"


def subject(family, *names, images=1, keep=0.3):
    """What the command loads, of a tiny model that has no processor."""
    model, inputs = tiny.build(family), tiny.inputs(family, images=(images,), seed=1)
    asker = SimpleNamespace(
        max_new_tokens=64,
        inputs=inputs,
        text=lambda: str(model.generate(**inputs, max_new_tokens=2)[0, -2:].tolist()),
        under=lambda methods, record: foveate.prune(model, methods, record=record),
    )
    return Subject(
        model,
        SimpleNamespace(image_processor=None),
        asker,
        [Image.new("RGB", (90, 60), "white")] * images,
        [Variant.asked([foveate.get_method(name, keep=keep)], [{"keep": keep}]) for name in names],
        {"model": family, "question": "What </script>?", "dtype": "float32", "device": "cpu"},
    )


class Page(HTMLParser):
    """Tags, their attributes, and the text of the data element."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.html = path.read_text("utf-8")
        self.feed(self.html)
        self.close()
        self.data = json.loads(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"{tag} closes another element"

    def handle_data(self, text):
        if self.open and self.open[-1] == ("script", "data"):
            self.text += text


def bits(text, n):
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n].astype(bool)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llava", ("fopru", "plphp")),
        ("llava_next", ("fastv", "plphp")),
        ("qwen2_5_vl", ("plphp", "random")),
        ("mllama", ("trimmed_llama",)),
    ],
)
@pytest.mark.parametrize("images", [1, 2])
def test_the_page_holds_every_frame_and_needs_nothing_else(family, names, images, tmp_path):
    what = subject(family, *names, images=images)
    show(what, out=tmp_path)
    page = Page(tmp_path / "show.html")
    assert not page.open, "every element is closed"
    assert "://" not in page.html and not {"link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert "What &lt;/script&gt;?" in page.html
    assert [v["label"] for v in page.data["variants"]] == [f"{name} keep 0.3" for name in names]
    assert len(page.data["pictures"]) == images
    target = find_target(what.model)
    reading = target.kinds.count("cross" if target.crosses else "self")
    assert all(p.startswith("data:image/png;base64,") for p in page.data["pictures"])
    for variant, each in zip(page.data["variants"], what.variants, strict=True):
        assert len(variant["layers"]) == reading == len(page.data["attention"])
        with foveate.prune(what.model, each.methods, record=True) as pruned:
            what.asker.text()
        places = pruned.report.image_tokens[0]
        for frame in variant["layers"]:
            kept = pruned.report.layers[frame["index"]].kept[0]
            assert frame["tokens"] == sum(len(p.positions) for p in places)
            assert frame["count"] == round(
                kept[:, torch.cat([p.positions for p in places])].sum(-1).float().mean().item(), 1
            )
            for place, heads in zip(places, frame["kept"], strict=True):
                assert len(heads) in (1, 2)
                for head, text in enumerate(heads):
                    expected = kept[head if len(kept) > 1 else 0, place.positions].numpy()
                    assert np.array_equal(bits(text, len(expected)), expected)
            check_ranks(variant["ranked"], frame, pruned.report, each.methods[0].name)
            looks = page.data["attention"][str(frame["index"])]
            assert [len(look["heads"]) for look in looks] == [3] * images, "both heads and their mean"
            assert all(len(base64.b64decode(look["heads"][0])) == len(p.positions)
                       for look, p in zip(looks, places, strict=True))  # fmt: skip
    for view in page.data["views"]:
        assert all(len(tile["index"]) == tile["grid"][0] * tile["grid"][1] for tile in view["tiles"])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    drawn = {f"{what}-{name.replace('_', '-')}-keep-0.3.png" for name in names for what in ("kept", "ranks")}
    assert pictures == {"attention.png", *drawn}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["layer"] for row in rows} == {frame["index"] for frame in page.data["variants"][0]["layers"]}
    assert all(0 <= row["attention_kept"] <= row["attention_image"] <= 1.0001 for row in rows)


def check_ranks(choices, frame, report, name):
    """What the page says of the choice that a layer shows, against the report's numbers."""
    layers = sorted(report.scores[name])
    assert len(choices) == len(layers)
    lasts = foveate.method_class(name).place not in ("cache", "depth", "decode")
    before = [n for n, layer in enumerate(layers) if layer == frame["index"] or (lasts and layer < frame["index"])]
    assert frame["ranked"] == (before[-1] if before else None)
    if before:
        scores = report.scores[name][layers[before[-1]]][0]
        for place, texts in zip(report.image_tokens[0], choices[before[-1]]["ranks"], strict=True):
            own, heads = scores[:, place.positions], texts if len(scores) == 1 else texts[1:]
            assert len(texts) == len(scores) + (len(scores) > 1)
            for row, text in zip(own, heads, strict=True):
                drawn = np.frombuffer(base64.b64decode(text), np.uint8)
                assert np.array_equal(drawn == 255, row.isnan().numpy()), "what was not asked about"
                order = row[~row.isnan()].argsort().numpy()
                assert (np.diff(drawn[drawn < 255][order].astype(int)) >= 0).all() and drawn[drawn < 255].max() == 254


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_script_of_the_page_runs(tmp_path):
    """With a document of its own that counts what is painted."""
    show(subject("llava_next", "plphp"), out=tmp_path)
    page = Page(tmp_path / "show.html")
    (script,) = re.findall(r"<script>\n(.*?)</script>", page.html, re.S)
    (tmp_path / "run.js").write_text(DOCUMENT % (json.dumps(page.text), script))
    done = subprocess.run(["node", tmp_path / "run.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    cells = sum(len(tile["index"]) for view in page.data["views"] for tile in view["tiles"])
    assert result["frames"] == 4 * 3
    assert result["cells"] == 3 * cells * result["frames"]
    assert result["lines"] > 0 and result["lines"] % 2 == 0, "a bright line and a black one at every border"
    assert len(set(result["captions"])) == 12
    assert result["names"] == [
        f"{view}, {what}" for view in ("overview", "tiles") for what in ("stays", "ranks", "attention")
    ]


DOCUMENT = """
let cells = 0, lines = 0, now = "";
const borders = ["rgb(0,0,0)", "rgb(255,176,0)"];
const context = {
  fillRect() { if (borders.includes(now)) lines += 1; else cells += 1; }, drawImage() {}, strokeRect() {},
  set fillStyle(style) { if (!/^rgba?\\([\\d.,e-]+\\)$/.test(style)) throw Error(style); now = style; },
};
const element = () => ({ value: 0, children: [], append(...more) { this.children.push(...more); },
  addEventListener(name, heard) { this.heard = heard; }, getContext: () => context });
const known = { data: { textContent: %s } };
globalThis.document = { getElementById: id => known[id] ??= element(), createElement: element };
const pictures = [];
globalThis.Image = class {
  constructor() { [this.complete, this.naturalWidth, this.naturalHeight] = [true, 40, 40]; pictures.push(this); }
};
globalThis.Option = class {};
%s
pictures.forEach(picture => picture.onload());
cells = lines = 0;
const captions = [];
for (let layer = 0; layer <= known.layer.max; layer++)
  for (let head = 0; head <= known.head.max; head++) {
    [known.layer.value, known.head.value] = [layer, head];
    known.layer.heard();
    captions.push(layer + head + known.caption.textContent + known["head-name"].textContent);
  }
const names = known.maps.children.map(figure => figure.children[0].textContent);
console.log(JSON.stringify({ frames: captions.length, captions, cells, lines, names }));
"""


@pytest.mark.parametrize("family", tiny.CORE)
def test_attention_is_the_last_row_of_the_eager_model(family):
    inputs = tiny.inputs(family)
    found = list(last_token_attention(tiny.build(family, "sdpa"), inputs).values())
    expected = tiny.build(family, "eager")(**inputs, output_attentions=True)
    rows = [a for a in expected.attentions if a is not None]
    if family == "mllama":  # which returns self-attention and cross-attention apart
        found = [row for row in found if row.shape[-1] == inputs["input_ids"].shape[1]]
        rows = [a for a in rows if a.shape[-1] == inputs["input_ids"].shape[1]]
    assert len(found) == len(rows) > 0
    for row, full in zip(found, rows, strict=True):
        assert torch.allclose(row, full[0, :, -1].unflatten(0, (2, 2)).mean(1), atol=1e-6)
        assert torch.allclose(row.sum(-1), torch.ones(2))


def test_the_model_is_left_as_it_was():
    model, inputs = tiny.build("llava", "sdpa"), tiny.inputs("llava")
    before = model(**inputs).logits
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    last_token_attention(model, inputs)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


# -- drawing --------------------------------------------------------------------------------------------------------


def test_dropped_cells_are_dark_and_the_hottest_is_brightest():
    picture = Image.new("RGB", (80, 40), "white")
    tile = Tile(torch.arange(8), (2, 4), torch.arange(8))
    centres = np.ix_([10, 30], [10, 30, 50, 70])
    kept = np.asarray(draw_share(picture, [tile], torch.tensor([1, 0, 0.5, 1, 0, 0, 1, 1.0])).convert("L"))[centres]
    assert (kept == 255).sum() == 4
    assert (abs(kept - 255 * DIM) < 2).sum() == 3
    heat = draw_heat(picture, [tile], torch.tensor([0, 0.1, 0.2, 0.9, 0.4, 0.3, 0.2, 0.0]))
    cells = np.asarray(heat.convert("L"))[centres].ravel()
    assert cells.argmax() == 3
    assert list(cells.argsort(kind="stable")) == [0, 7, 1, 2, 6, 5, 4, 3]
    assert np.isfinite(np.asarray(draw_heat(picture, [tile], torch.zeros(8)))).all()
    assert len(palette()) == 768


def test_who_decided_what_a_layer_holds():
    none = [torch.zeros(1, 2)]
    rows = ("fastv", "layer", 2), ("csp", "cache", 2), ("csp", "cache", 3)
    fastv, csp, other = (Ranked(*row, none) for row in rows)
    assert [decided([fastv, csp, other], layer) for layer in range(6)] == [None, None, 1, 2, 0, 0]
    assert Ranked("pages", "decode", 2, none).at == "layer 2, the last step"


def test_methods_of_one_layer_stand_in_the_order_in_which_they_act():
    with foveate.prune(tiny.build("llava"), ["csp", "fastv"], record=True) as pruned:
        pruned.model.generate(**tiny.inputs("llava"), max_new_tokens=1)
    assert [(each.method, each.layer) for each in ranked(pruned.report)] == [
        *(("csp", layer) for layer in (0, 1)), ("fastv", 2), ("csp", 2), ("csp", 3)
    ]  # fmt: skip


def test_tokens_of_tiles_compete_within_them():
    with foveate.prune(tiny.build("llava_next"), "divprune", record=True) as pruned:
        pruned.model.generate(**tiny.inputs("llava_next"), max_new_tokens=1)
    (choice,), (image,) = ranked(pruned.report), pruned.report.image_tokens[0]
    for tile in image.tiles:
        own = choice.ranks[0][0, tile.index]
        assert own.amin() < 0.1 and own.amax() > 0.9  # equal ones share a place
    pinned = torch.ones(len(image.positions), dtype=torch.bool)
    pinned[torch.cat([tile.index for tile in image.tiles])] = False
    assert choice.ranks[0][0, pinned].isnan().all() and pinned.any()


def test_the_first_is_brightest_and_what_was_not_asked_about_is_pale():
    picture, tile = Image.new("RGB", (80, 40), "white"), Tile(torch.arange(8), (2, 4), torch.arange(8))
    scores = torch.tensor([[-3.0, 5, torch.nan, 2, 2, -torch.inf, 9, 7]])
    assert ranks(scores)[0].nan_to_num(9).tolist() == pytest.approx([1 / 6, 4 / 6, 9, 2.5 / 6, 2.5 / 6, 0, 1, 5 / 6])
    cells = np.asarray(draw_rank(picture, [tile], ranks(scores)[0]).convert("L"))[np.ix_([10, 30], [10, 30, 50, 70])]
    flat = cells.ravel()
    assert flat[2] == 255, "the picture is white"
    assert list(np.delete(flat, 2).argsort(kind="stable")) == [4, 0, 2, 3, 1, 6, 5]


def test_tiles_above_each_other_become_views():
    def at(*box):
        return Tile(torch.arange(4), (2, 2), torch.arange(4), box)

    picture = Image.new("RGB", (8, 8))
    whole, left, right = at(0, 0, 1, 1), at(0, 0, 0.5, 1), at(0.5, 0, 1, 1)
    assert [(v.name, v.tiles) for v in views([[picture]], [(whole, left, right)])] == [
        ("overview", (whole,)),
        ("tiles", (left, right)),
    ]
    assert [(v.image, v.name) for v in views([[picture]] * 2, [(left, right), (whole,)])] == [(0, ""), (1, "")]


def test_every_frame_of_a_clip_is_a_view():
    def at(frame):
        return Tile(torch.arange(4) + 4 * frame, (2, 2), torch.arange(4), frame=frame)

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue", "white")]
    clip = views([frames], [(at(0), at(1), at(2), at(3))])
    assert [(v.image, v.name) for v in clip] == [(0, f"frame {number}") for number in (1, 2, 3, 4)]
    assert [v.picture for v in clip] == frames
    # Qwen joins two pictures into one frame: the first of them is drawn.
    assert [v.picture for v in views([frames], [(at(0), at(1))])] == frames[::2]


# -- the command ----------------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(app, ["show", *map(str, args)])


def test_the_command_writes_pictures_and_a_page(tmp_path):
    out = tmp_path / "seen"
    result = run(PICTURE, QUESTION, "-m", "plphp", "-m", "pyramiddrop", "--keep", "0.25", "--out", out)
    assert result.exit_code == 0, result.output
    assert "plphp keep 0.25: bottom left" in result.stdout
    assert "show.html" in result.stderr
    page = Page(out / "show.html")
    assert [len(v["layers"]) for v in page.data["variants"]] == [6, 6]
    assert page.data["variants"][0]["answer"] == "bottom left"
    per_head, staged = (Image.open(out / f"kept-{name}-keep-0.25.png") for name in ("plphp", "pyramiddrop"))
    assert per_head.height > 6 * 280 > 3 * staged.height, "a row a layer; stages side by side"
    assert Image.open(out / "ranks-pyramiddrop-keep-0.25.png").height > 3 * 280, "a row a stage"
    rows = json.loads((out / "rows.json").read_text())
    assert [row["kept"] for row in rows if row["method"].startswith("pyramiddrop")] == [144, 144, 90, 57, 36, 36]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    again = run(PICTURE, QUESTION, "-m", "plphp", "-m", "pyramiddrop", "--keep", "0.25", "--out", out)
    assert again.exit_code == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert f"{len(rows)} rows kept, measured on " in again.stderr and f"nothing new in {out}" in again.stderr
    one = run(PICTURE, QUESTION, "-m", "plphp", "--keep", "0.25", "--out", out)
    assert f"wrote {out}/show.html" in one.stderr and len(Page(out / "show.html").data["variants"]) == 1
    shorter = run(PICTURE, QUESTION, "-m", "plphp", "--keep", "0.25", "--out", out, "--max-new-tokens", "1")
    assert shorter.exit_code == 2 and "max_new_tokens" in shorter.stderr


def test_the_command_shows_what_a_guide_chose(tmp_path):
    result = run(PICTURE, QUESTION, "-m", "sgl", "--keep", "0.25", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "sgl keep 0.25: bottom left" in result.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["kept"] for row in rows] == [144, 36, 36, 36, 36, 36]
    assert {row["since"] for row in rows} == {"prefill"}
    first, *pruned = [
        bits(layer["kept"][0][0], 144) for layer in Page(tmp_path / "show.html").data["variants"][0]["layers"]
    ]
    assert first.all() and all(np.array_equal(layer, pruned[0]) for layer in pruned)
    owl = pruned[0].reshape(12, 12)[8:, :4]
    assert owl.mean() > 2 * pruned[0].mean(), "the small model looks at it, too"
    assert Image.open(tmp_path / "kept-sgl-keep-0.25.png").width > 760


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([PICTURE], "foveate show"),
        (["nowhere.png", QUESTION], "no such picture"),
        ([PICTURE, QUESTION, "-m", "magic"], "unknown method"),
        ([PICTURE, QUESTION, "-m", "trimmed_llama"], "which llava models lack"),
        ([PICTURE, QUESTION, "-m", "fastv", "-o", "layer=99"], "layer must be in"),
        ([PICTURE, QUESTION, "-m", "fopru+random"], "both act"),
        ([PICTURE, QUESTION, "-m", "sgl", "-o", "exit_threshold=0.0"], "the guide answered alone"),
        ([PICTURE, QUESTION, "-m", "sgl", "--guide", "./nowhere"], "(--guide takes"),
        ([PICTURE, QUESTION, "-m", "plphp", "--guide", "./nowhere"], "none of the methods takes a guide"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(args, expected, tmp_path):
    result = run(*args, "--out", tmp_path / "new")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: ") and expected in line
    assert not (tmp_path / "new").exists()
