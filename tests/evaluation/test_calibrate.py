"""foveate calibrate: certificates that hold what they say and are checked where they run, mistakes told before work."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.asking.sure import Sure
from foveate.commands.app import app
from foveate.engine.certified import rungs_of
from foveate.evaluation import calibrate as calibrating
from foveate.evaluation import calibrate_questions
from foveate.evaluation.calibrate_options import Options
from foveate.evaluation.calibrate_questions import Said
from foveate.evaluation.calibrate_report import Certificate, Found, Point
from foveate.evaluation.guarantees import Rule
from foveate.evaluation.losses import LOSSES, find_loss
from foveate.evaluation.monitor import look
from foveate.evaluation.policies import Judge, climb
from foveate.evaluation.questions import Item, from_glimpse
from foveate.evaluation.runner import Batches, generate

EASY = ("--agree", 0.6, "--confidence", 0.6, "--count", 8, "--batch-size", 8, "--max-new-tokens", 8)


def run(*args, command="calibrate"):
    return CliRunner().invoke(app, [command, *map(str, args)])


def told(result):
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1].removeprefix("foveate: ")


# -- the whole way, on a model that answers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest of glimpse's models in a folder of its own, with a processor."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = glimpse.load("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("calibrate") / "certificate.json"
    result = run("--model", tiny, "--data", "glimpse", "--grid", "1.0,0.9", *EASY, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout and [path.name for path in out.parent.iterdir()] == [out.name]
    return out


@pytest.fixture
def model():
    return glimpse.load("tiny")[0]


def test_a_certificate_says_what_was_asked_and_is_asked_with(certificate, model, tiny):
    held = json.loads(certificate.read_text())
    promised = held["certificate"]
    assert held["keep"] == 0.9 and promised["statement"].startswith("csp, keep=0.9, ") and promised["n"] == 8
    assert "at least 60 % of them, with 60 % confidence" in promised["statement"]
    (point,) = promised["tried"]["csp"]["points"]
    processor = glimpse.load("tiny")[1]
    batches = Batches(processor, from_glimpse(8, None, calibrating.FIRST), 8)
    whole = generate(model, processor, batches, 8)
    with foveate.prune(model, certificate=certificate) as pruned:
        said = generate(model, processor, batches, 8)
        assert pruned.methods == (foveate.CSP(keep=0.9),)
    errors = sum(one != other for one, other in zip(said, whole, strict=True))
    assert (point["errors"], point["asked"], point["certified"]) == (errors, 8, True)
    assert point["p"] == pytest.approx(Rule("binomial", 0.4, 0.4).p(errors, 8)) and point["p"] <= 0.4
    result = run("examples/demo.png", "Where is the owl?", "--certificate", certificate, "--model", tiny,
                 "--max-new-tokens", 8, command="ask")  # fmt: skip
    assert result.exit_code == 0 and "of 144 image tokens" in result.stdout, result.output


@pytest.mark.parametrize(
    ("method", "words"), [("pages", "% of the cache that a step reads"), ("evs", "keep=1.0 (it drops nothing here)")]
)
def test_what_evicts_nothing_is_promised_for_what_its_steps_read(tmp_path, tiny, method, words):
    out, grid = tmp_path / "certificate.json", ("--grid", "1.0,0.9")
    result = run("--model", tiny, "--data", "glimpse", "--methods", method, *grid, *EASY, "--out", out)
    assert result.exit_code == 0 and words in " ".join(result.stdout.split()), result.output
    promised = json.loads(out.read_text())["certificate"]
    (point,) = promised["tried"][method]["points"]
    assert point["certified"] and point["kept"] == promised["kept"]
    assert 0.85 < point["kept"] < 1 if method == "pages" else point["kept"] == 1


def test_a_cascade_is_certified_and_asked(tmp_path, tiny):
    out = tmp_path / "cascade.json"
    result = run("--model", tiny, "--data", "glimpse", "--policy", "cascade", "--grid", "1.0,0.5", *EASY, "--out", out)
    assert result.exit_code == 0, result.output
    held = json.loads(out.read_text())
    promised = held["certificate"]
    assert promised["grid"] == [1.0, 0.5] and promised["tried"]["csp"]["points"][0]["sure"] > 0
    promised |= {"policy": "cascade", "rungs": [0.5], "method": {**held["certificate"]["method"], "keep": 0.5}}
    words = ("examples/demo.png", "Where is the owl?", "--certificate", out, "--model", tiny, "--max-new-tokens", 8)
    for sure, last in ((1.5, "then untouched: all 144 image tokens"), (0.0, "72 of 144 image tokens")):
        out.write_text(json.dumps({**held, "certificate": {**promised, "sure": sure}}))
        with pytest.raises(ValueError, match="certifies a cascade"):
            foveate.Method.from_pretrained(out)
        result = run(*words, command="ask")
        assert result.exit_code == 0 and last in " ".join(result.stdout.split()), result.output
        assert "csp keep 0.5: 0." in result.stdout or "csp keep 0.5: 1." in result.stdout


@pytest.mark.parametrize(
    ("certified", "policy", "rungs", "sure", "keeps"),
    [(True, "cascade", [0.25], 0.9, [0.25]), (False, "fixed", [], None, [1.0])],
)
def test_a_cascade_of_which_nothing_is_certified_asks_once_with_everything(
    certified, policy, rungs, sure, keeps, tmp_path
):
    point = Point(0.9, 100, 0.4, 1.0, certified, {"all": (100, 9.0, 0.2)})
    found = Found("csp", "cascade", foveate.CSP(), [point], (0.25,), 2.0)
    options = Options(
        model="glimpse", data="glimpse", methods="csp", policy="cascade", agree=0.95, confidence=0.9,
        guarantee="high", loss="exact", grid=None, groups=False, count=100, batch_size=8, max_new_tokens=8,
        seed=0, device="auto", dtype="auto", attn=None, guide=None,
    )  # fmt: skip
    held = Certificate(options, Rule("binomial", 0.05, 0.1), 100, {"all": 100}, 3.0, [found], {}).to_dict()
    promised = held["certificate"]
    assert (promised["policy"], promised["rungs"], promised["sure"]) == (policy, rungs, sure)
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(held))
    assert [method.keep for method in rungs_of(path)] == keeps
    if not certified:
        assert foveate.Method.from_pretrained(path).keep == 1.0
        assert "keep=1.0 (nothing less can be promised)" in promised["statement"]


# -- what it is checked against ---------------------------------------------------------------------------------------


def refused(model, method, **options):
    with pytest.raises(foveate.UnsupportedError) as caught:
        foveate.prune(model, method, **options)
    return str(caught.value)


def test_a_certificate_of_something_else_is_refused(certificate, model):
    def method():
        return foveate.Method.from_pretrained(certificate)

    foveate.prune(model, method()).remove()
    other = method()
    other.keep = 0.25
    assert "is of csp with another keep than runs here (keep=0.25, certified 0.9)" in refused(model, other)
    assert "is of csp alone" in refused(model, [method(), "fopru"])
    assert "certificate is of another dtype (float32, and this is float64)" in refused(model.double(), method())
    model.float().set_attn_implementation("eager")
    assert "another attention backend (sdpa, and this is eager)" in refused(model, method())
    model.set_attn_implementation("sdpa")
    model.generation_config.do_sample = True
    assert "is of greedy answers, and this samples" in refused(model, method())
    model.generation_config.do_sample = False
    with foveate.prune(model, method()), pytest.raises(foveate.UnsupportedError, match="greedy answers"):
        model.generate(input_ids=torch.tensor([[1, 2]]), do_sample=True, max_new_tokens=1)
    with torch.no_grad():
        next(p for p in model.model.parameters() if p.ndim > 1).neg_()
    assert "another model, by its weights" in refused(model, method())
    assert "another model" in refused(glimpse.load("small")[0], method())


def test_prune_takes_a_certificate_alone_and_no_other_file(certificate, model, tmp_path):
    with pytest.raises(ValueError, match="give certificate= alone"):
        foveate.prune(model, "csp", certificate=certificate)
    foveate.CSP().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no certificate: make one with foveate calibrate"):
        foveate.prune(model, certificate=tmp_path / "foveate_config.json")


@pytest.mark.parametrize(
    "change, more, words",
    [
        ({}, (), "is of answers by transformers, and vLLM's kernels round differently: give --other-backend"),
        ({}, ("--keep", "0.5"), "is of another keep"),
        ({"config": "0"}, (), "is of another model"),
        ({}, ("--", "--dtype", "bfloat16"), "is of float32, and vLLM would run bfloat16"),
        ({}, ("--", "--dtype", "float32"), "kernels round differently"),
        ({}, ("--other-backend",), None),
        ({"setting": {"backend": "vllm", "dtype": "float32"}}, (), None),
    ],
)
def test_a_server_checks_it_too(tmp_path, change, more, words, tiny):
    path = tmp_path / "served.json"
    config = foveate.FoPru(keep=0.75).to_dict()
    from foveate.asking.loading import read_config
    from foveate.asking.subject import config_digest

    promised = {"method": config, "setting": {"backend": "transformers", "dtype": "float32"}}
    promised |= {"config": config_digest(read_config(tiny)), **change}
    path.write_text(json.dumps({**config, "certificate": promised}))
    given = more if "--dtype" in more else (*more, "--", "--dtype=float32")
    result = run(tiny, "--dry-run", "--certificate", path, *given, command="serve")
    if words is None:
        assert result.exit_code == 0 and "certificate" not in result.stdout.splitlines()[-1], result.output
    else:
        assert words in told(result)


# -- a model that is played -------------------------------------------------------------------------------------------


class Played:
    """A model that says other things to some questions when it keeps less than these need.

    asked: how many batches. stop: after so many comes Ctrl-C.
    """

    def __init__(self, monkeypatch) -> None:
        self.asked, self.stop, self.method = 0, None, None
        self.needs = lambda index: 0.8 if index % 20 == 0 else 0.4 if index % 3 == 0 else 0.0
        monkeypatch.setattr(foveate, "prune", self.prune)
        monkeypatch.setattr(calibrate_questions, "generate", self.generate)
        monkeypatch.setattr(calibrate_questions.Sure, "least", property(lambda sure: self.sure), raising=True)
        monkeypatch.setattr(calibrating, "fitting", lambda model, chosen, left_out: chosen)
        loaded = glimpse.load("tiny")
        monkeypatch.setattr(calibrating, "load", lambda *_, **__: loaded)
        monkeypatch.setattr(calibrating, "own_questions", lambda *_: ("played", self.questions, {}))
        monkeypatch.setattr(calibrating, "usable", lambda processor, items, size, bad: PlayedBatches(items, size))

    def questions(self, count, first):
        return [Item((), f"{index}?", (), "abcd"[index % 4]) for index in range(count)]

    @contextmanager
    def prune(self, model, method, **_):
        self.method = method
        try:
            share = method.keep if method else 1.0
            yield SimpleNamespace(report=SimpleNamespace(images=[[(1000, round(1000 * share))]] * 64, decoding=None))
        finally:
            self.method = None

    def generate(self, model, processor, batches, max_new_tokens, after, **_):
        if self.asked == self.stop:
            raise KeyboardInterrupt
        self.asked += 1
        after()
        keep, (batch,) = self.method.keep if self.method else 1.0, batches
        self.sure = [0.9 if keep >= self.needs(index) else 0.3 for index in batch.indices]
        return ["same" if keep >= self.needs(index) else "other" for index in sorted(batch.indices)]


class PlayedBatches:
    def __init__(self, items, size):
        self.items, indices = items, list(range(len(items)))
        self.groups = [
            SimpleNamespace(indices=indices[at : at + size], clips=None) for at in range(0, len(indices), size)
        ]

    def __len__(self):
        return len(self.groups)

    def mixed(self):
        return iter(self.groups)


@pytest.fixture
def played(monkeypatch):
    return Played(monkeypatch)


PLAYED = ("--count", 120, "--batch-size", 8, "--agree", 0.9, "--confidence", 0.9, "--grid", "1.0,0.5,0.3,0.2")


def test_an_interrupted_calibration_goes_on_where_it_was(played, tmp_path):
    whole, out = tmp_path / "whole.json", tmp_path / "certificate.json"
    assert run(*PLAYED, "--out", whole).exit_code == 0
    total = played.asked
    points = json.loads(whole.read_text())["certificate"]["tried"]["csp"]["points"]
    assert [(p["keep"], p["certified"]) for p in points] == [(0.5, True), (0.3, False)], "0.2 is not even asked"
    assert points[0]["asked"] == 120 and points[0]["errors"] == 6
    assert points[1]["asked"] < 60, "and 0.3 only until it has failed"
    assert total == 15 + sum(-(-p["asked"] // 8) for p in points)
    played.asked, played.stop = 0, total // 2
    result = run(*PLAYED, "--out", out)
    assert result.exit_code == 130 and "the same command goes on there" in result.stderr
    assert not out.exists() and (tmp_path / "certificate.json.partial").exists()
    assert "holds a calibration with another count" in told(run(*PLAYED, "--count", 100, "--out", out))
    played.stop = None
    assert run(*PLAYED, "--out", out).exit_code == 0
    assert played.asked == total, "no batch twice"
    ours, theirs = (json.loads(path.read_text())["certificate"] for path in (out, whole))
    for name in ("statement", "kept", "method"):
        assert ours[name] == theirs[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json", "whole.json"]


def test_what_fails_early_is_what_fails_at_all(played, tmp_path, monkeypatch):
    ask = calibrate_questions.Asked.ask
    for seed in range(3):
        rng = np.random.default_rng(seed)
        needs = rng.choice([0.05, 0.25, 0.4, 0.6], 120, p=[0.8, 0.1, 0.08, 0.02])
        played.needs = lambda index, needs=needs: needs[index]
        found = []
        for curtailed in (True, False):
            with monkeypatch.context() as patch:
                if not curtailed:
                    patch.setattr(calibrate_questions.Asked, "ask", lambda self, method, enough=None: ask(self, method))
                out = tmp_path / f"{seed}-{curtailed}.json"
                assert run(*PLAYED, "--out", out).exit_code == 0
            found.append(json.loads(out.read_text()))
        assert found[0]["keep"] == found[1]["keep"]
        expected = [keep for keep in (0.5, 0.3, 0.2) if (needs > keep).sum() <= Rule("binomial", 0.1, 0.1).most(120)]
        assert found[0]["keep"] == min(expected, default=1.0)


def test_methods_and_groups_share_the_error(played, tmp_path):
    out = tmp_path / "two.json"
    assert run(*PLAYED, "-m", "csp,visual_snapkv", "--out", out).exit_code == 0
    promised = json.loads(out.read_text())["certificate"]
    assert promised["delta"] == pytest.approx(0.05) and set(promised["tried"]) == {"csp", "visual_snapkv"}
    line = told(run(*PLAYED, "--groups", "--out", tmp_path / "groups.json"))
    assert "questions of type" in line and "are too few" in line
    grouped = ("--agree", 0.5, "--confidence", 0.5, "--count", 120, "--batch-size", 8, "--groups")
    assert run(*grouped, "--out", tmp_path / "groups.json").exit_code == 0
    promised = json.loads((tmp_path / "groups.json").read_text())["certificate"]
    assert "on questions of each type" in promised["statement"]
    assert sum(promised["groups"].values()) == 120 and promised["delta"] == 0.5 / len(promised["groups"])
    for point in promised["tried"]["csp"]["points"]:
        worst = max(group["p"] for group in point["groups"].values())
        assert point["p"] == worst and point["certified"] == (worst <= promised["delta"])


def test_on_average_fewer_questions_do(played, tmp_path):
    out, few = tmp_path / "mean.json", ("--count", 24, "--agree", 0.9, "--batch-size", 8)
    played.needs = lambda index: 0.0
    assert "22 are needed" in told(run("--count", 20, "--agree", 0.9, "--out", out))
    assert run(*few, "--guarantee", "average", "--out", out).exit_code == 0
    promised = json.loads(out.read_text())["certificate"]
    assert promised["statement"].endswith("on average over calibrations") and promised["test"] == "conformal"


def test_an_unpromising_method_gets_everything(played, tmp_path):
    played.needs, out = (lambda index: 0.95), tmp_path / "all.json"
    result = run(*PLAYED, "--out", out)
    assert result.exit_code == 0 and "nothing less can be promised" in result.stdout
    method = foveate.Method.from_pretrained(out)
    assert method.keep == 1.0 and method.keeps_all


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_cascade_climbs_until_it_is_sure():
    few = [Said("a", 0.9, 0.25, 0), Said("b", 0.4, 0.25, 0), Said("c", 0.1, 0.25, 0)]
    more = [Said("A", 1.0, 0.5, 0), Said("B", 0.8, 0.5, 0), Said("C", 0.2, 0.5, 0)]
    whole = [Said("x", 0.0, 1.0, 0)] * 3
    said, kept = climb([few, more], whole, 0.8)
    assert [one.text for one in said] == ["a", "B", "x"] and kept.tolist() == [0.25, 0.75, 1.75]
    said, kept = climb([few, more], whole, 0.0)
    assert [one.text for one in said] == ["a", "b", "c"] and kept.tolist() == [0.25] * 3


def test_how_sure_an_answer_is(model):
    """Beside the logits that generate() returns, also behind the end of the shorter answers of a batch."""
    processor = glimpse.load("tiny")[1]
    (batch,) = Batches(processor, from_glimpse(6, ("what", "where", "count")), 6)
    sure = Sure.of(model)
    options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for _ in range(2):  # anew with every call
        out = model.generate(**batch.inputs, logits_processor=[sure], **options)
    new = out.sequences[:, batch.inputs["input_ids"].shape[1] :]
    ends = torch.tensor(model.generation_config.eos_token_id).view(-1).tolist()
    assert len({row.tolist().index(ends[0]) if ends[0] in row else 9 for row in new}) > 1, "of several lengths"
    for row in range(6):
        least = 1.0
        for step, token in enumerate(new[row].tolist()):
            least = min(least, float(out.logits[step][row].double().softmax(-1)[token]))
            if token in ends:
                break
        assert sure.least[row] == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize(
    "name, said, untouched, loss",
    [
        ("exact", "A cat. ", "A cat.", 0),
        ("exact", "a cat", "A cat.", 1),
        ("normalised", "a cat", "A cat.", 0),
        ("normalised", "two cats", "a cat", 1),
        ("f1", "the red cat", "a red cat", 1 - 2 * 2 / 6),
        ("f1", "red red", "red", 1 - 2 * 1 / 3),
        ("f1", "", "", 0),
        ("f1", "", "cat", 1),
        ("operator:ne", "a", "b", 1),
    ],
)
def test_losses(name, said, untouched, loss):
    assert find_loss(name)(said, untouched) == pytest.approx(loss)
    assert all(each("x y", "x y") == 0 for each in LOSSES.values())


ANSWERS = Path(__file__).parents[2] / "benchmarks/results/eval/answers.csv"


def disagreements(column):
    import csv

    with ANSWERS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return np.array([row["type"] for row in rows]), np.array([row[column] != row["untouched"] for row in rows])


def test_a_promise_holds_on_splits_of_real_answers_and_breaks_on_other_questions():
    """Of 300 of glimpse's answers about the rest; then of an easy type of question about a hard one."""
    rng, rule, broken = np.random.default_rng(0), Rule("binomial", 0.05, 0.1), 0
    columns = [disagreements(f"csp keep={keep}")[1] for keep in (0.5, 0.25, 0.1)]
    for _ in range(300):
        order = rng.permutation(len(columns[0]))
        for lost in columns:
            if not rule.passes(lost[order[:300]].sum(), 300):
                break
            broken += lost[order[300:]].mean() > 0.05
    assert broken / 300 <= 0.1 + 3 * (0.09 / 300) ** 0.5
    types, lost = disagreements("elastic_cache keep=0.5")
    easy, hard = lost[types == "exists"], lost[types == "number"]
    assert rule.passes(easy.sum(), len(easy)), "calibrated on the easy ones alone it is certified"
    seen = look(rng.permutation(hard).astype(float).tolist(), 0.05, binary=True)
    assert seen.alarm and seen.p < 1e-6 and "ALARM after request" in " ".join(seen.sentences())
    assert not look(easy.astype(float).tolist(), 0.05, binary=True).alarm


def test_the_monitor_reads_noted_answers(certificate, tmp_path):
    noted = tmp_path / "shadow.jsonl"
    for other, code in (("b", 1), ("a", 0)):
        noted.write_text("".join(json.dumps({"pruned": "a", "untouched": other}) + "\n" for _ in range(40)))
        result = run("--monitor", certificate, "--data", noted)
        assert result.exit_code == code and ("ALARM" in result.stdout) == bool(code), result.output
    noted.write_text('{"pruned": "a"}\n')
    assert 'line 1: write {"pruned": "one answer", "untouched": "the other"}' in told(
        run("--monitor", certificate, "--data", noted)
    )
    noted.write_text("")
    assert "is empty" in told(run("--monitor", certificate, "--data", noted))


def test_the_monitor_asks_new_questions(certificate, tiny):
    result = run("--monitor", certificate, "--model", tiny, "--data", "glimpse", "--count", 8, "--batch-size", 8)
    assert result.exit_code == 0 and "of 8 requests differ" in result.stdout, result.output
    assert "another model" in told(run("--monitor", certificate, "--count", 8))


def test_graded_losses_stop_early_too():
    groups = {"all": list(range(60))}
    whole = [Said("a b c d", 1, 1, 0)] * 60
    judge = Judge(whole, find_loss("f1"), Rule("hoeffding-bentkus", 0.1, 0.1), groups)
    some = [Said("a b c x", 1, 1, 0)] * 30
    assert judge.passes(judge.losses([*some[:5], *[None] * 55])) and not judge.passes(
        judge.losses([*some, *[None] * 30])
    )
    assert judge.losses(some + [None] * 30).sum() == pytest.approx(30 * 0.25)


@pytest.mark.parametrize(
    "words, line",
    [
        (("--grid", "0.5,0.25"), "--grid 0.5,0.25 lacks 1.0, the budget that always agrees"),
        (("--grid", "1.0"), "--grid 1 leaves nothing to choose"),
        (("--grid", "1.0,2"), "--grid 1,2: give fractions in (0, 1]"),
        (("--grid", "1.0,x"), "--grid 1.0,x: write fractions with commas"),
        (("--temperature", 0.7), "--temperature 0.7 samples, and two sampled answers differ by themselves"),
        (("--model", "owner/name"), "--data is missing: a folder with a data.jsonl"),
        (("--count", 30), "30 questions are too few: even if all answers agreed, 45 are needed for 95 % agreement"),
        (("--policy", "best"), "--policy best is unknown: use fixed, mass, cascade"),
        (("--policy", "mass", "-m", "fastv"), "fastv has no scores of tokens that add up to a mass"),
        (("--loss", "rouge"), "--loss rouge is unknown"),
        (("--loss", "builtins:len"), "--loss builtins:len fails on"),
        (("--agree", 1), "--agree 1 is no part in (0, 1)"),
        (("--guarantee", "average", "-m", "csp,fopru"), "--guarantee average has no error to share among methods"),
        (("-m", "mint"), "mint compares with the untouched model at every step"),
        (("-m", "nothing"), "unknown method 'nothing'"),
    ],
)
def test_mistakes_are_told_before_work(tmp_path, words, line):
    assert line in told(run(*words, "--out", tmp_path / "c.json"))
    assert not list(tmp_path.iterdir())


def test_no_data_and_no_name(tmp_path, certificate, tiny):
    assert "cannot read" in told(run("--data", tmp_path / "no", "--out", tmp_path / "c.json"))
    assert "--out is missing" in told(run())
    assert "there already" in told(run("--out", certificate))
    assert "--max-new-tokens 8" in told(
        run("examples/demo.png", "What?", "--certificate", certificate, "--model", tiny, command="ask")
    )
