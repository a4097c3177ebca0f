"""foveate search: a schedule that holds what it says, scores that outlive interrupts, and mistakes told before work."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager

import pytest
import tiny
import torch
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.asking.mistake import Mistake
from foveate.asking.subject import option_files
from foveate.commands.app import app
from foveate.evaluation import search as searching
from foveate.evaluation import search_questions, workplace
from foveate.evaluation.attention import last_token_attention
from foveate.evaluation.questions import from_glimpse, split
from foveate.evaluation.rankings import agreement, kendall
from foveate.evaluation.runner import Batches, generate
from foveate.evaluation.search_questions import Notes, Part, Questions
from foveate.evaluation.search_report import Found

SMALL = ("--count", 32, "--test", 24, "--batch-size", 16)


def run(*args):
    return CliRunner().invoke(app, ["search", *map(str, args)])


def told(result):
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1].removeprefix("foveate: ")


# -- the whole way --------------------------------------------------------------------------------------------------


def test_a_schedule_is_found_written_and_used(tmp_path):
    """On a model that answers: what the file says must be what its schedule scores."""
    out = tmp_path / "schedule.json"
    result = run("--grid", "0.75", "--tolerance", 0.1, "--count", 20, "--test", 20, "--out", out)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.json"], "what was noted on the way is gone"
    method = foveate.Method.from_pretrained(out)
    about = json.loads(out.read_text())["search"]
    assert method.rates == tuple(about["rates"]) and set(method.rates) <= {0.75, 1.0} and method.rates[0] < 1
    assert about["search"]["untouched"] - about["search"]["score"] <= 0.1 + 1e-9
    assert about["token_layers"] == pytest.approx((1 + sum(method.rates)) / 6)
    model, processor = glimpse.load()
    for name, first, count in (("search", 500_000, 20), ("test", 0, 20)):
        items = from_glimpse(count, None, first)
        with foveate.prune(model, method):
            said = generate(model, processor, Batches(processor, items, 16))
        right = sum(text in item.answers for text, item in zip(said, items, strict=True))
        assert about[name]["score"] == pytest.approx(right / count) and about[name]["questions"] == count
    assert f"--method gsearch -o schedule={out}" in result.stdout and f"--keep {method.keep}" in result.stdout
    assert "trust the test" in result.stdout, "glimpse's layers rank differently, and that is said"
    words = ["ask", "examples/demo.png", "Where is the owl?", "-m", "gsearch", "-o", f"schedule={out}"]
    assert CliRunner().invoke(app, words).stdout.startswith("bottom left")
    assert "there already" in told(run(*SMALL, "--out", out))


def test_layers_are_compared_by_the_attention_of_the_untouched_model():
    model, processor = glimpse.load()
    items = from_glimpse(3, ("what", "count", "word"))
    fast = agreement(model, processor, Batches(processor, items, 3), foveate.GSearch().score)
    each = []
    for item in items:
        (batch,) = Batches(processor, [item], 1)
        image = batch.inputs["input_ids"][0] == model.config.image_token_id
        maps = [heads.mean(0)[image] for heads in last_token_attention(model, batch.inputs).values()]
        each.append(kendall(torch.stack(maps)))
    assert torch.allclose(fast, torch.stack(each).mean(0), atol=2e-3)


# -- interrupts -----------------------------------------------------------------------------------------------------


class Played:
    """A model whose answers are right where every layer sees what it needs; else a fourth of them are wrong.

    asked: how many batches. stop: after so many comes Ctrl-C.
    """

    def __init__(self, monkeypatch) -> None:
        self.needs, self.asked, self.stop = (0.75, 0.75, 0.5, 0.5, 0.25), 0, None
        self.method = None
        monkeypatch.setattr(foveate, "prune", self.prune)
        monkeypatch.setattr(search_questions, "generate", self.generate)
        monkeypatch.setitem(search_questions.MATCHES, "exact", lambda said, accepted: said == "right")
        monkeypatch.setattr(searching, "fitting", lambda model, chosen, left_out: chosen)
        monkeypatch.setattr(searching, "agreement", lambda *_: torch.eye(6, dtype=torch.float64))

    @contextmanager
    def prune(self, model, method, **_):
        self.method = method
        try:
            yield
        finally:
            self.method = None

    def generate(self, model, processor, batches, max_new_tokens=64):
        if self.asked == self.stop:
            raise KeyboardInterrupt
        self.asked += 1
        rates = self.method.rates_at(6) if self.method else (1.0,) * 5
        enough = all(rate >= need - 1e-9 for rate, need in zip(rates, self.needs, strict=True))
        return ["right" if enough or index % 4 else "wrong" for index in sorted(batches[0].indices)]


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


@pytest.mark.parametrize("method", ["gsearch", "psigmoid"])
def test_an_interrupted_search_goes_on_where_it_was(played, tmp_path, method):
    whole, out = tmp_path / "whole.json", tmp_path / "schedule.json"
    command = ("--method", method, "--grid", "0.25,0.5,0.75", *SMALL)
    assert run(*command, "--out", whole).exit_code == 0
    expected, total = json.loads(whole.read_text()), played.asked
    if method == "gsearch":
        assert expected["rates"] == [0.75, 0.75, 0.5, 0.5, 0.25] and not expected["search"]["contradictions"]
    played.asked, played.stop = 0, total // 2
    result = run(*command, "--out", out)
    assert result.exit_code == 130 and "the same command goes on there" in result.stderr
    assert not out.exists() and (tmp_path / "schedule.json.partial").exists()
    assert "with another seed" in told(run(*command, "--seed", 3, "--out", out)) and not out.exists()
    played.stop = None
    assert run(*command, "--out", out).exit_code == 0
    found = json.loads(out.read_text())
    assert found == expected
    assert total <= played.asked <= total + 2, "at most the schedule that was stopped is asked again"
    assert sorted(os.listdir(tmp_path)) == ["schedule.json", "whole.json"]


@pytest.mark.parametrize("method", ["gsearch", "psigmoid"])
def test_where_nothing_can_go_nothing_is_written_and_what_was_asked_is_of_use(played, tmp_path, method):
    played.needs, out = (0.9,) * 5, tmp_path / "schedule.json"
    command = ("--method", method, *SMALL, "--out", out)
    line = told(run(*command, "--grid", "0.25,0.5"))
    assert line.startswith("nothing can go: every schedule of the grid loses more than --tolerance 0.01 of 32 answers")
    assert not out.exists()
    before = played.asked
    assert told(run(*command, "--grid", "0.25,0.5")) == line and played.asked == before, "known"
    assert run(*command, "--grid", "0.25,0.5", "--tolerance", 0.3).exit_code == 0
    assert json.loads(out.read_text())["keep"] == pytest.approx(0.25)


def test_the_smallest_grid_that_passes_is_said(played, tmp_path):
    played.needs = (0.1,) * 5
    result = run("--grid", "0.25,0.5", *SMALL, "--out", tmp_path / "schedule.json")
    assert "nothing less could be asked: give a --grid with smaller values" in result.stdout


def test_the_data_and_the_order_of_kinds_do_not_decide(played, tmp_path):
    """A score that cannot pass any more stops; the schedule is the same as if all had been asked."""
    played.needs, out = (0.75,) * 5, tmp_path / "schedule.json"
    result = run("--grid", "0.25,0.75", *SMALL, "--out", out)
    assert "and stops" in result.stderr
    assert json.loads(out.read_text())["rates"] == [0.75] * 5


# -- the questions --------------------------------------------------------------------------------------------------


def questions(tmp_path, played, **how):
    _, processor = object(), glimpse.load()[1]
    items = from_glimpse(24, ("what", "count"))
    return Questions("search", None, processor, Batches(processor, items, 4), Notes(tmp_path / "notes", {}), **how)


def test_hits_stop_as_soon_as_they_cannot_suffice(played, tmp_path):
    asked, method = questions(tmp_path, played), foveate.GSearch(rates=(0.5,) * 5)
    part = asked.hits(method, needed=0.95)
    assert 0 < part.count(None) < 24 and len(part) - part.count(False) < 0.95 * 24
    batches = played.asked
    assert asked.hits(method, needed=0.95) == part and played.asked == batches, "known"
    whole = asked.hits(method)
    assert None not in whole and whole.count(False) == 6
    assert all(one in (None, other) for one, other in zip(part, whole, strict=True))
    assert asked.hits(method, needed=0.95) == whole
    again = Questions("search", None, None, asked.batches, Notes(tmp_path / "notes", {}))
    assert again.hits(method) == whole and played.asked == batches + 6


def test_agreement_is_with_the_untouched_model(played, tmp_path):
    asked = questions(tmp_path, played, score="agreement")
    assert all(asked.hits(foveate.GSearch(rates=(0.9,) * 5))) and all(asked.hits(None))
    assert asked.hits(foveate.GSearch(rates=(0.5,) * 5)).count(False) == 6


def test_a_part_is_scored_pair_by_pair(played, tmp_path):
    part = Part.of(questions(tmp_path, played), foveate.GSearch(rates=(0.5,) * 5), seed=0)
    assert (part.questions, part.untouched, part.score, part.lost) == (24, 1.0, 0.75, 0.25)
    assert part.low < 0.75 < part.high and part.lost_low < 0.25 < part.lost_high
    assert part.lost_low == pytest.approx(1 - part.high) and part.lost_high == pytest.approx(1 - part.low)


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', '{"settings": 1, "known": 2}'])
def test_notes_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "notes").write_text(text)
    with pytest.raises(Mistake, match="delete it"):
        Notes(tmp_path / "notes", {})


def test_search_and_test_share_no_picture():
    items = [item for each in from_glimpse(30, ("what", "count")) for item in (each, each)]
    one, other = split(items, 20, 16, seed=0)
    assert (len(one), len(other)) == (20, 16)
    assert not {str(item.images) for item in one} & {str(item.images) for item in other}
    assert split(items, 20, 16, seed=0) == (one, other) != split(items, 20, 16, seed=1)
    assert [len(part) for part in split(items, 40, 40, seed=0)] == [40, 20]


# -- words ----------------------------------------------------------------------------------------------------------


def found(**changes):
    part = Part(500, 0.97, 0.965, 0.95, 0.98, 0.005, -0.002, 0.008)
    tau = [[1.0, 0.1, 0.1], [0.1, 1.0, 0.8], [0.1, 0.8, 1.0]]
    plain = dict(
        method=foveate.GSearch(rates=(0.5, 0.25)), rates=(0.5, 0.25), tolerance=0.01, search=part, test=part,
        evaluations=7, contradictions=[], tau=tau, smallest=False,
    )  # fmt: skip
    return " ".join(Found(**(plain | changes)).sentences())


def test_the_words_say_what_the_figures_say():
    assert "58.3 % of the image tokens, 1.71 times fewer" in found()
    assert "loses 0.5 points, within the tolerance of 1" in found() and "up to" not in found()
    wide = Part(500, 0.97, 0.965, 0.95, 0.98, 0.005, -0.01, 0.02)
    assert "within the tolerance of 1; it may be up to 2.0 (95 % interval)" in found(test=wide)
    assert "loses 3.0 points, more than" in found(test=Part(500, 0.97, 0.94, 0.9, 0.96, 0.03, 0.01, 0.05))
    assert "they agree" in found() and "none contradicts" in found()
    assert "does not hold here" in found(tau=[[1.0, 0.9, 0.9], [0.9, 1.0, 0.69], [0.9, 0.69, 1.0]])
    assert "50 25 % passes, and 75 25 %" in found(contradictions=[((0.75, 0.25), (0.5, 0.25))])


# -- mistakes -------------------------------------------------------------------------------------------------------


def dataset(folder, count=0, rows=None):
    folder.mkdir()
    lines = []
    for number, item in enumerate(from_glimpse(count, ("what",))):
        item.images[0].save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": item.question} | (rows or {"answers": item.answers}))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "fastv"), "--method fastv has no schedule to search for: use gsearch or psigmoid"),
        (("--method", "nonsense"), "use gsearch or psigmoid"),
        (("--tolerance", "-0.1"), r"--tolerance -0.1 is no loss in [0, 1)"),
        (("--tolerance", "1"), r"[0, 1)"),
        (("--tolerance", "nan"), r"[0, 1)"),
        (("--score", "loss"), "accuracy, or agreement"),
        (("--match", "fuzzy"), "exact or contains"),
        (("--grid", "a,b"), "write fractions"),
        (("--grid", "0.5,0.25"), "ascending fractions"),
        (("--grid", "0.5,1"), "ascending fractions"),
        (("--grid", "0"), "keeps nothing"),
        (("--grid", "0,0.5", "--method", "psigmoid"), "keeps nothing"),
        (("-o", "keep=0.5"), "-o keep: that is what is searched for"),
        (("-o", "rows=first"), "rows must be"),
        (("-o", "layer=2"), "no option layer"),
        (("--count", "10"), "at least 20"),
        (("--test", "10"), "at least 20"),
        (("--dtype", "int8"), "--dtype int8 is unknown"),
        (("--model", "somebody/model"), "--data is missing"),
        (("--model", "glimpse-cross"), "mllama models lack"),
        (("--data", "nowhere"), "cannot read nowhere/data.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_begins(words, says, tmp_path):
    assert says in told(run(*words, "--out", tmp_path / "schedule.json"))
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    assert "no folder" in told(run("--out", tmp_path / "none" / "schedule.json"))
    assert "is a folder" in told(run("--out", tmp_path))

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written to (Permission denied)" in told(run("--out", tmp_path / "schedule.json"))


def test_data_that_does_not_do_is_told(tmp_path):
    out = ("--out", tmp_path / "schedule.json")
    few = dataset(tmp_path / "few", 25)
    assert "too few questions: 20 to search with, and 5 others" in told(run("--data", few, "--count", 20, *out))
    bare = dataset(tmp_path / "bare", 3, {"type": "x"})
    assert '"answers"; --score agreement needs no answers' in told(run("--data", bare, *out))
    assert "too few" in told(run("--data", bare, "--score", "agreement", *out))
    assert not (tmp_path / "schedule.json").exists()


def test_data_without_answers_is_searched_by_agreement(played, tmp_path):
    data, out = dataset(tmp_path / "data", 42, {"type": "x"}), tmp_path / "schedule.json"
    with (data / "data.jsonl").open("a") as file:
        file.write("\n{}")
    result = run("--data", data, "--score", "agreement", "--count", 21, "--grid", "0.5,0.75", "--out", out)
    assert result.exit_code == 0, result.output
    assert "left out: data.jsonl, line 43" in result.stderr
    about = json.loads(out.read_text())["search"]
    assert about["search"]["untouched"] == 1 and about["settings"]["data"] == "data" and about["settings"]["digest"]
    assert about["search"]["questions"] == about["test"]["questions"] == 21


def test_a_schedule_of_one_model_is_refused_by_another(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"method": "gsearch", "rates": [0.5] * 5, "search": {}}))
    with pytest.raises(ValueError, match="for a model of 6 layers, this one has 4"):
        foveate.prune(tiny.build("llava"), foveate.Method.from_pretrained(path))
    words = ["ask", "examples/demo.png", "Where?", "-m", "psigmoid", "-o", f"schedule={path}"]
    assert "one of gsearch, not of psigmoid" in told(CliRunner().invoke(app, words))


class Stop(Exception):
    pass


def test_results_of_a_schedule_that_changed_do_not_mix(tmp_path):
    """The name of its file stays the same, and stands in the rows."""
    path, seen = tmp_path / "schedule.json", []
    options = workplace.Options(
        model="glimpse", methods=f"gsearch:schedule={path},rows=text", keep="0.5", data=None, count=1, batch_size=1,
        max_new_tokens=1, match="exact", seed=0, device="cpu", dtype="auto", attn=None, guide=None,
    )  # fmt: skip

    def check(settings):
        seen.append(settings)
        raise Stop

    for rate in (0.5, 0.5, 0.25):
        path.write_text(json.dumps({"method": "gsearch", "rates": [rate] * 5}))
        with pytest.raises(Stop):
            workplace.prepare(options, check)
    assert seen[0] == seen[1] != seen[2] and list(seen[0]["option_files"]) == [str(path)]
    assert option_files([{"rows": "text", "keep": 0.5}, {"schedule": None}]) == {}
