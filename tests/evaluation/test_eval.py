"""foveate eval: honest figures, rows that outlive interrupts, and broken methods that cannot hide."""

import csv
import json
import os
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.asking.mistake import Mistake
from foveate.asking.variant import Variant
from foveate.commands.app import app
from foveate.evaluation import evaluate, plots
from foveate.evaluation.accuracy import BASELINES, GROUPS, UNTOUCHED, Answers, measure
from foveate.evaluation.cost import prefill_flops
from foveate.evaluation.jobs import Processes
from foveate.evaluation.questions import draw, from_folder, from_glimpse
from foveate.evaluation.results import Results, read
from foveate.evaluation.runner import Batches, generate
from foveate.evaluation.scores import exact_match, holds
from foveate.evaluation.workplace import Options, prepare
from foveate.methods.base import CacheMethod, EncoderMethod, LayerMethod, floor_budget, topk_mask
from foveate.methods.baselines import strided


def run(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


@pytest.fixture(scope="module")
def asked():
    """glimpse, and six questions of each kind."""
    model, processor = glimpse.load()
    return model, processor, Batches(processor, from_glimpse(96), 30)


def score(asked, folder, *variants):
    """The rows of some variants, by label; those that a folder has are kept."""
    results = Results(folder, "eval", {}, keys=("method", "keep"))
    with results:
        assert not measure(*asked, variants, results, groups=GROUPS)
    return {row["method"]: row for row in results.rows}


BLIND = [name for name in BASELINES if name != "random_cross"]  # those that fit a LLaVA


def uniform(keep=0.5):
    return Variant("uniform", keep, (foveate.get_method("uniform", keep=keep),))


@pytest.fixture(scope="module")
def scored(asked, tmp_path_factory):
    """A folder with the untouched model's answers, and those of half of the tokens."""
    folder = tmp_path_factory.mktemp("scored")
    score(asked, folder, uniform())
    return folder


@pytest.fixture
def begun(scored, tmp_path):
    """A folder that goes on from there."""
    return shutil.copytree(scored, tmp_path / "begun")


# -- methods that are broken on purpose ---------------------------------------------------------------------------


@dataclass
class LeastAttended(EncoderMethod):
    """Keeps what the vision encoder cares least about."""

    name = "broken"
    reads = frozenset({"cls"})

    def select(self, tokens, budget):
        return topk_mask(-tokens.cls[:, -1], budget)


@dataclass
class OtherPicture(EncoderMethod):
    """Keeps the right places of the wrong picture of the batch."""

    name = "broken"
    reads = frozenset({"features"})

    def select(self, tokens, budget):
        return strided(budget, tokens.features.shape[1])

    def merge(self, tokens, keep):
        return tokens.features.roll(1, 0)


@dataclass
class Ignored(LayerMethod):
    """Keeps what the prompt's last token attends to least, inside the LLM."""

    name = "broken"

    def stages(self, depth):
        return (1,)

    def select(self, tokens):
        scores = -tokens.last_attention().mean(1).masked_fill(~tokens.groups.present, torch.inf)
        return topk_mask(scores, floor_budget(self.share(tokens.groups), tokens.groups))


@dataclass
class IgnoredInCache(CacheMethod):
    """Keeps what the prompt's last token attends to least, in the cache: the first word is said before it acts."""

    name = "broken"

    def select(self, scores, budget):
        return super().select((-scores).masked_fill(scores.isneginf(), -torch.inf), budget)


@pytest.mark.parametrize("broken", [LeastAttended, OtherPicture, Ignored])
def test_a_method_that_keeps_the_wrong_tokens_is_exposed(broken, asked, begun):
    rows = score(asked, begun, uniform(), Variant("broken", 0.5, (broken(keep=0.5),)))
    assert rows[UNTOUCHED]["accuracy"] > 0.9 and rows["uniform"]["accuracy"] > 0.7
    assert rows["broken"]["kept_share"] == pytest.approx(0.5)
    assert rows["broken"]["accuracy"] < rows["uniform"]["accuracy"] - 0.3
    assert rows["broken"]["accuracy_high"] < rows["uniform"]["accuracy_low"]  # the intervals part
    assert rows["broken"]["agreement_high"] < rows["uniform"]["agreement_low"]


def test_a_broken_eviction_shows_in_long_answers(asked, tmp_path):
    model, processor, _ = asked
    batches = Batches(processor, from_glimpse(24, ("describe",)), 24)
    blind = Variant("random_cache", 0.5, (foveate.get_method("random_cache", keep=0.5),))
    rows = score((model, processor, batches), tmp_path, blind, Variant("broken", 0.5, (IgnoredInCache(0.5),)))
    assert rows["broken"]["accuracy_high"] < rows["random_cache"]["accuracy_low"]


# -- what the figures mean ----------------------------------------------------------------------------------------


def test_keeping_everything_is_the_untouched_model(asked, begun):
    rows = score(asked, begun, Variant("all", 1.0, (foveate.get_method("plphp", keep=1.0),)))
    untouched, everything = rows[UNTOUCHED], rows["all"]
    assert everything["accuracy"] == untouched["accuracy"] and everything["agreement"] == 1.0
    for share in ("kept_share", "kv_share", "read_share", "prefill_share"):
        assert everything[share] == untouched[share] == 1.0


def test_rows_hold_shares_intervals_and_groups(asked, scored):
    row = score(asked, scored, uniform())["uniform"]
    assert row["questions"] == 96 and row["keep"] == 0.5 and row["place"] == "encoder"
    assert row["kept_share"] == 0.5 and 0.5 < row["kv_share"] < 0.75  # the text stays
    for part in ("", *(f":{name}" for name in (*GROUPS, *glimpse.KINDS))):
        for what in ("accuracy", "agreement"):
            assert row[f"{what}_low{part}"] <= row[f"{what}{part}"] <= row[f"{what}_high{part}"]
    assert {*GROUPS["one_word"], *GROUPS["more_words"]} == set(glimpse.KINDS)
    sizes = {part: 6 * len(GROUPS[part]) for part in ("one_word", "more_words")}
    for what in ("accuracy", "agreement"):
        mean = sum(row[f"{what}:{part}"] * size for part, size in sizes.items()) / 96
        assert mean == pytest.approx(row[what])
    with (scored / "answers.csv").open() as file:
        lines = list(csv.DictReader(file))
    right = sum(line["uniform keep=0.5"] == line["accepted"] for line in lines)
    assert right / 96 == pytest.approx(row["accuracy"])


def test_what_is_evicted_behind_the_prefill_changes_no_first_word(asked, begun):
    lost = [Variant(name, 0.1, (foveate.get_method(name, keep=0.1),)) for name in ("random_cache", "plphp")]
    rows = score(asked, begun, *lost)
    for name in ("random_cache", "plphp"):
        assert rows[name]["agreement:one_word"] > 0.85 and rows[name]["agreement:more_words"] < 0.8
    columns = [f"{variant.label} keep={variant.keep}" for variant in lost]
    with (begun / "answers.csv").open() as file:
        for line in csv.DictReader(file):
            first = {line[column][0] for column in (UNTOUCHED, *columns)}  # of a number: its digit
            assert len(first) == 1 or line["type"] == "again", "only a second turn sees nothing but what was left"


def test_what_steps_read_is_drawn_where_they_choose(asked, tmp_path, monkeypatch):
    model, processor, _ = asked
    batches = Batches(processor, from_glimpse(12, ("describe",)), 12)
    chosen = [Variant(name, 0.25, (foveate.get_method(name, keep=0.25),)) for name in ("last_step", "random_cache")]
    rows = score((model, processor, batches), tmp_path, *chosen)
    assert rows["last_step"]["kv_share"] == 1.0 and 0.25 < rows["last_step"]["read_share"] < 0.8
    assert rows["random_cache"]["read_share"] == rows["random_cache"]["kv_share"] < 1
    drawn = {}
    monkeypatch.setattr(plots, "curves", lambda rows, path, **how: drawn.update({path.name: how["x"]}))
    monkeypatch.setattr(plots, "pareto", lambda rows, path, **how: drawn.update({path.name: how["xlabel"]}))
    for share, word in (("read_share", "a step reads"), ("kv_share", "behind the prefill")):
        found = SimpleNamespace(rows=list(rows.values()), folder=tmp_path, due=lambda name: True)
        evaluate._draw(found, "", {})
        assert drawn["accuracy.png"] == share and word in drawn["pareto.png"]
        for row in rows.values():  # as an earlier release wrote them
            row.pop("read_share", None)


@pytest.mark.slow
def test_the_price_of_a_prefill_is_what_is_computed(asked, tmp_path):
    names = {"uniform": 0.25, "random_layer": 0.25, "random_cache": 0.25, "mint": 0.25}
    rows = score(asked, tmp_path, *(Variant(n, keep, (foveate.get_method(n, keep=keep),)) for n, keep in names.items()))
    shares = {name: row["prefill_share"] for name, row in rows.items()}
    assert shares["random_cache"] == 1.0 and rows["random_cache"]["kv_share"] < 0.5, "it is cheaper only later"
    assert shares["uniform"] < shares["random_layer"] < 1 < shares["mint"]
    model, _, batches = asked
    config, inputs = model.config, batches.middle.inputs
    flops = prefill_flops(model, inputs)
    assert flops == prefill_flops(model, inputs)
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim > 1)
    heads, text = config.text_config.num_hidden_layers * config.text_config.hidden_size, inputs["input_ids"].shape
    floor = 2 * weights * text.numel() + 4 * heads * text.numel() * text[1]
    tower = sum(p.numel() for n, p in model.model.vision_tower.named_parameters() if p.ndim > 1 and "layers" in n)
    pictures = len(inputs["pixel_values"])
    floor += 2 * tower * pictures * 145 + 4 * config.vision_config.hidden_size * 6 * pictures * 145**2
    assert floor < flops < 1.1 * floor


# -- several turns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["glimpse", "cross"])
def test_a_talk_goes_on_as_if_all_of_it_had_been_one_prompt(size):
    model, processor = glimpse.load(size)
    items = from_glimpse(6, ("again",))
    said = generate(model, processor, Batches(processor, items, 4))
    for item, text in zip(items, said, strict=True):
        image = [{"type": "image", "image": item.pictures()[0]}]
        first = generate(model, processor, Batches(processor, [replace(item, before=(), question=item.before[0])], 1))
        talk = [
            {"role": "user", "content": [*image, {"type": "text", "text": item.before[0]}]},
            {"role": "assistant", "content": [{"type": "text", "text": first[0]}]},
            {"role": "user", "content": [{"type": "text", "text": item.question}]},
        ]
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        whole = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(whole, skip_special_tokens=True).strip() == text
    assert generate(model, processor, Batches(processor, items, 4), one_cache=False) == said


def test_three_turns_and_their_answers_are_one_row(tmp_path, undrawn):
    question = next(q for q in glimpse.heldout(20) if q.kind == "describe")
    question.image.save(tmp_path / "0.png")
    row = {"image": "0.png", "question": question.question, "answers": [question.answer]}
    row["before"] = ["How many things are there?", "What is at the top left?"]
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    args = ("--data", tmp_path, "--methods", "fastv", "--keep", 0.9, "--out", tmp_path / "out")
    assert run(*args).exit_code == 0
    rows = {row["method"]: row for row in read(tmp_path / "out")[0]}
    assert rows[UNTOUCHED]["questions"] == 1 and rows["fastv"]["kept_share"] < 1
    with (tmp_path / "out/answers.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["question"] == " | ".join([*row["before"], question.question])


# -- several processes --------------------------------------------------------------------------------------------


def test_several_processes_write_the_same_rows(tmp_path, undrawn):
    args = ("--methods", "fastv,sgl", "--keep", "0.5", "--count", 6, "--out")
    one, two = run(*args, tmp_path / "one"), run(*args, tmp_path / "two", "--jobs", 2)
    assert one.exit_code == two.exit_code == 0, two.output
    assert one.stdout == two.stdout
    rows = [{**row, "seconds": None} for row in read(tmp_path / "one")[0]]
    assert rows == [{**row, "seconds": None} for row in read(tmp_path / "two")[0]]
    assert read(tmp_path / "two")[1]["finished"]


@pytest.mark.slow
def test_what_fails_in_another_process_costs_the_others_nothing(tmp_path):
    question = glimpse.heldout(1)[0]
    question.image.save(tmp_path / "0.png")
    row = {"image": "0.png", "question": question.question, "answers": [question.answer]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    options = Options(
        "glimpse", "fastv,uniform", "0.5", str(tmp_path), None, 4, 8, "exact", 0, "cpu", "auto", None, None
    )
    place = prepare(options)
    jobs = Processes(2, replace(options, data=str(tmp_path / "gone")))
    with Results(tmp_path / "out", "eval", {}, keys=("method", "keep")) as results:
        failed = measure(place.model, place.processor, place.batches, place.variants, results, groups={}, jobs=jobs)
    assert len(failed) == len(place.variants) and [row["method"] for row in results.rows] == [UNTOUCHED]


def test_where_the_guide_answers_everything_no_share_is_kept(tmp_path):
    methods = "sgl:exit_threshold=0.0,sgl:exit_threshold=1.0"
    args = ("--methods", methods, "--keep", 0.5, "--count", 2, "--batch-size", 1, "--out", tmp_path)
    assert run(*args).exit_code == 0
    rows = {row["method"]: row for row in read(tmp_path)[0]}
    shares = {name: (rows[name]["kept_share"], rows[name]["kv_share"]) for name in rows}
    assert shares["sgl:exit_threshold=0.0"] == (None, None) and shares[UNTOUCHED] == (1.0, 1.0)
    assert 0.4 < shares["sgl:exit_threshold=1.0"][0] < 1
    assert (tmp_path / "accuracy.png").exists() and run(*args).exit_code == 0


@pytest.mark.slow
def test_all_answers_of_batches_made_anew_are_the_same(asked):
    model, processor, batches = asked
    fresh = Batches(processor, batches.items, 27, memory=0)
    assert generate(model, processor, fresh) == generate(model, processor, batches)


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_a_second_run_repeats_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = ("--methods", "fopru:strategy=row,fastv", "--keep", "0.5,16", "--count", 9, "--out", out)
    first = run(*args)
    assert first.exit_code == 0, first.output
    rows, about = read(out)
    labels = [UNTOUCHED, *BLIND, "fopru:strategy=row", "fastv"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == labels
    assert [row["keep"] for row in rows] == [None, *[0.5, 16] * (len(labels) - 1)]
    assert about["settings"]["count"] == 9 and about["finished"]
    for label in labels:
        assert label in first.stdout
    for name in ("accuracy", *(f"accuracy-{group}" for group in GROUPS), "pareto"):
        for price in ("", "-prefill"):
            with Image.open(out / f"{name}{price}.png") as picture:
                assert min(picture.size) > 400

    monkeypatch.setattr("foveate.evaluation.accuracy.generate", None)  # nobody is asked again
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    again = run(*args)
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert read(out)[0] == rows
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert f"{len(rows)} rows kept, measured on " in again.stderr and "; 0 measured now" in again.stderr
    assert f"nothing new in {out}" in again.stderr and "kept" not in first.stderr and f"wrote {out}" in first.stderr


def test_ctrl_c_leaves_finished_rows_and_the_same_command_goes_on(tmp_path, monkeypatch, undrawn):
    args = ("--methods", "fastv", "--keep", "0.5", "--count", 2, "--out", tmp_path / "out")
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr("foveate.evaluation.accuracy.generate", interrupted)
    stopped = run(*args)
    assert stopped.exit_code == 130
    assert f"stopped: 2 finished rows are in {tmp_path / 'out'}" in stopped.stderr
    assert [row["method"] for row in read(tmp_path / "out")[0]] == [UNTOUCHED, "random"]
    resumed = run(*args)
    assert resumed.exit_code == 0, resumed.output
    whole = run(*args[:-1], tmp_path / "whole")
    assert "2 rows kept, measured on " in resumed.stderr and "; 5 measured now" in resumed.stderr
    assert resumed.stdout == whole.stdout and len(calls) == 3 + len(read(tmp_path / "out")[0]) - 2 + 7


def test_what_was_answered_of_a_row_survives_ctrl_c(tmp_path, monkeypatch, undrawn):
    args = ("--methods", "csp", "--keep", "0.5", "--count", 3, "--batch-size", 1, "--out", tmp_path / "out")
    calls = []

    def interrupted(model, processor, batches, *args, **kwargs):
        calls.append(batches)
        if len(calls) == 6:  # the last batch of the second row
            raise KeyboardInterrupt
        return generate(model, processor, batches, *args, **kwargs)

    monkeypatch.setattr("foveate.evaluation.accuracy.generate", interrupted)
    assert run(*args).exit_code == 130
    assert json.loads((tmp_path / "out/partial.json").read_text())["column"] == "random keep=0.5"
    assert run(*args).exit_code == 0
    rows, _ = read(tmp_path / "out")
    assert len(calls) == 3 * len(rows) + 1, "only the batch that was interrupted is asked again"
    assert not (tmp_path / "out/partial.json").exists()
    run(*args[:-1], tmp_path / "whole")
    plain = [{name: value for name, value in row.items() if name != "seconds"} for row in read(tmp_path / "whole")[0]]
    assert [{name: value for name, value in row.items() if name != "seconds"} for row in rows] == plain


def test_a_folder_of_another_command_is_refused(tmp_path):
    with Results(tmp_path, "eval", {"model": "other"}, keys=("method", "keep")):
        pass
    result = run("--count", 1, "--out", tmp_path)
    assert result.exit_code == 2 and "holds rows with model other, not glimpse" in result.stderr


def test_one_method_that_fails_costs_the_others_nothing(tmp_path, monkeypatch, undrawn):
    def fail(self, tokens, budget):
        raise RuntimeError("a bug in the method")

    monkeypatch.setattr(foveate.method_class("divprune"), "select", fail)
    result = run("--methods", "divprune,fastv", "--keep", 0.5, "--count", 2, "--out", tmp_path)
    assert result.exit_code == 1
    assert "divprune keep=0.5 failed: a bug in the method" in result.stderr
    assert [row["method"] for row in read(tmp_path)[0]] == [UNTOUCHED, *BLIND, "fastv"]
    assert "Traceback" in (tmp_path / "errors.txt").read_text()


def test_without_out_the_same_command_goes_on_after_a_failure_and_after_ctrl_c_while_plots_are_drawn(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = ("--methods", "divprune", "--keep", 0.5, "--count", 1)
    select = foveate.method_class("divprune").select

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(foveate.method_class("divprune"), "select", fail)
    assert run(*args).exit_code == 1
    monkeypatch.setattr(foveate.method_class("divprune"), "select", select)
    with monkeypatch.context() as patch:
        patch.setattr("foveate.evaluation.evaluate._draw", stop)
        stopped = run(*args)
        assert stopped.exit_code == 130 and "the same command goes on there" in stopped.stderr
    assert run(*args).exit_code == 0
    (folder,) = (tmp_path / "results").iterdir()
    rows, about = read(folder)
    assert [row["method"] for row in rows] == [UNTOUCHED, *BLIND, "divprune"]
    assert about["finished"] and [each["rows"] for each in about["runs"]] == [len(BLIND) + 1, 1]


def test_what_does_not_fit_is_left_out_of_all_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(foveate, "methods", lambda: ["fastv", "trimmed_llama"])
    result = run("--keep", 0.5, "--count", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "left out: trimmed_llama: it drops tokens in cross-attention, which llava models lack" in result.stderr


def test_the_model_with_cross_attention_is_asked_what_it_knows(tmp_path):
    asked = ("--model", "glimpse-cross", "--methods", "trimmed_llama", "--keep", 0.1, "--count", 28)
    result = run(*asked, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in read(tmp_path)[0]}
    assert list(rows) == [UNTOUCHED, "random_cross", "trimmed_llama"]
    assert rows[UNTOUCHED]["accuracy"] > 0.85 and "accuracy:which" not in rows[UNTOUCHED]
    assert 0.1 <= rows["trimmed_llama"]["kept_share"] < 0.5


MISTAKES = {
    "unknown method": (["--methods", "magic"], "unknown method 'magic'"),
    "method that does not fit": (["--methods", "trimmed_llama"], "which llava models lack"),
    "layer that the model lacks": (["--methods", "fastv:layer=99", "--count", "1"], "fastv:layer=99"),
    "keep of zero": (["--keep", "0.5,0"], "--keep 0.5,0"),
    "unknown match": (["--match", "fuzzy"], "use exact or contains"),
    "unknown dtype": (["--dtype", "int3"], "--dtype int3"),
    "another model without questions": (["--model", "nobody/nothing"], "--data is missing"),
    "no such data": (["--data", "nowhere"], "cannot read nowhere/data.jsonl"),
    "out is a file": (["--out", "file.txt", "--count", "1"], "is a file"),
    "out holds something else": (["--out", ".", "--count", "1"], "no folder of results"),
    "guide for nobody": (["--methods", "fopru", "--guide", "./nowhere"], "none of the methods takes a guide"),
    "guide as an option": (["--methods", "sgl:guide=nowhere"], "is given by --guide"),
    "no such guide": (["--methods", "sgl", "--guide", "./nowhere"], "(--guide takes"),
    "no questions": (["--count", "0"], "--count"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line_and_nothing_is_written(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    args, expected = MISTAKES[mistake]
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: ") and expected in line
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


# -- a user's own questions ---------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Four good rows, one with two pictures, and one row for everything that can be wrong."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = []
    for index, question in enumerate(glimpse.heldout(3)):
        question.image.save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "question": question.question, "answers": ["never", question.answer]}
        rows.append(json.dumps({**row, "type": question.kind}))
    rows.append(json.dumps({"images": ["0.png", "1.png"], "question": "What is there?", "answer": 3, "id": "extra"}))
    rows += ["", *BAD]
    (folder / "data.jsonl").write_bytes("\n".join(rows).encode() + b"\n\xff\xfe\n")
    return folder


GOOD = '"image": "0.png", "question": "q?", "answers": ["a"]'
BAD = {
    "{" + GOOD: "not JSON",
    "[1, 2]": "not an object",
    '{"question": "q?", "answers": ["a"]}': 'no "image"',
    '{"image": "0.png", "question": "q?"}': 'no "answers"',
    '{"image": "0.png", "answers": ["a"]}': '"question" is missing',
    '{"image": "none.png", "question": "q?", "answers": ["a"]}': "no such picture",
    '{"image": "data.jsonl", "question": "q?", "answers": ["a"]}': "no picture that Pillow can read",
    '{"image": "0.png", "question": "q?", "answers": []}': '"answers" must be a text or a list of texts, got []',
    '{"image": "0.png", "question": "q?", "answers": [null]}': "got [null]",
    '{"image": "0.png", "question": "q?", "answers": [" "]}': "empty text",
    "{" + GOOD + ', "type": 3}': '"type" is empty or no text',
    '{"image": "0.png", "question": "q?", "answers": ["a", "\\ud800"]}': "lone surrogate",
    '{"image": "0.png", "question": "\\udfff?", "answers": ["a"]}': "lone surrogate",
    '{"image": "\\ud800.png", "question": "q?", "answers": ["a"]}': "lone surrogate",
    "{" + GOOD + ', "type": "\\ud800"}': "lone surrogate",
    "[" * 100_000: "nested too deeply",
    '{"image": "%s", "question": "q?", "answers": ["a"]}' % ("A" * 400): "too long for the name of a file",
    "{" + GOOD + ', "before": [3, " "]}': "empty text",
    '{"image": "0.png", "question": "is <image> red?", "answers": ["a"]}': "stands for an image",
}


def test_bad_rows_are_named_and_counted_and_the_rest_runs(data, tmp_path):
    result = run("--data", data, "--methods", "fastv", "--keep", 0.5, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    rows, about = read(tmp_path / "out")
    assert [row["method"] for row in rows] == [UNTOUCHED, *BLIND, "fastv"]
    assert all(row["questions"] == 4 and row["bad_rows"] == len(BAD) + 1 for row in rows)
    assert rows[0]["accuracy:what"] == rows[0]["accuracy:where"] == 1.0 and "accuracy:grounding" not in rows[0]
    assert about["settings"]["data"] == "mine" and str(tmp_path) not in json.dumps(about["settings"])
    lines = (tmp_path / "out/bad-rows.txt").read_text().splitlines()
    for number, (line, cause) in enumerate(zip(lines, [*BAD.values(), "not UTF-8"], strict=True), start=6):
        assert line.startswith(f"data.jsonl, line {number}: ") and cause in line
        assert line in result.stderr or number > 15
    assert f"left out: {len(BAD) + 1 - 10} more rows, see bad-rows.txt" in result.stderr


def test_changed_data_is_not_mixed_into_old_rows(data, tmp_path, undrawn):
    args = ("--data", data, "--methods", "uniform", "--keep", 0.5, "--out", tmp_path / "out")
    assert run(*args).exit_code == 1
    (data / "data.jsonl").write_text("{" + GOOD + "}\n")
    result = run(*args)
    assert result.exit_code == 2 and "holds rows with digest" in result.stderr


def test_changed_pictures_are_not_mixed_into_old_rows(tmp_path, undrawn):
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    questions = glimpse.heldout(3)
    rows = [{"image": f"{index}.png", "question": q.question, "answers": q.answer} for index, q in enumerate(questions)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def pictures(broken=None):
        for index, question in enumerate(questions):
            question.image.save(folder / f"{index}.png")
        if broken is not None:
            (folder / f"{broken}.png").write_text("none")

    args = ("--data", folder, "--keep", 0.5, "--out", out, "--methods")
    pictures(broken=0)
    assert run(*args, "uniform").exit_code == 1
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for broken in (1, None):  # as many questions as before, and one more
        pictures(broken)
        result = run(*args, "fastv")
        assert result.exit_code == 2 and "holds rows with digest" in result.stderr
    pictures(broken=0)
    questions[2].image.rotate(180).save(folder / "2.png")
    assert "holds rows with digest" in run(*args, "fastv").stderr
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    pictures(broken=0)
    assert run(*args, "uniform").exit_code == 1  # as it was


def test_changed_weights_are_not_mixed_into_old_rows(data, tmp_path, undrawn):
    model = tmp_path / "model"
    shutil.copytree(glimpse.PATH, model)
    args = ("--data", data, "--model", model, "--methods", "uniform", "--keep", 0.5, "--out", tmp_path / "out")
    assert run(*args).exit_code == run(*args).exit_code == 1
    os.utime(model / "model.safetensors")
    result = run(*args)
    assert result.exit_code == 2 and "holds rows with model_files" in result.stderr


def test_the_digest_does_not_ask_where_the_folder_is(data, tmp_path):
    digest = from_folder(data)[2]
    assert from_folder(data.rename(tmp_path / "elsewhere"))[2] == digest


def test_answers_to_other_questions_are_not_mixed(tmp_path):
    answers = Answers(tmp_path / "answers.csv", from_glimpse(3))
    answers.add("one", ["a", "b", "c"])
    assert Answers(answers.path, from_glimpse(3)).said == {"one": ["a", "b", "c"]}
    for others in (from_glimpse(4), from_glimpse(4)[1:]):
        with pytest.raises(Mistake, match="other questions"):
            Answers(answers.path, others)


def test_rows_that_are_no_longer_bad_are_no_longer_listed(tmp_path, undrawn):
    args = ("--methods", "uniform", "--keep", 0.5, "--count", 1, "--out", tmp_path)
    assert run(*args).exit_code == 0
    (tmp_path / "bad-rows.txt").write_text("data.jsonl, line 1: broken\n")
    assert run(*args).exit_code == 0
    assert not (tmp_path / "bad-rows.txt").exists()


def test_data_without_one_good_row_is_a_mistake(tmp_path):
    for text, cause in (("", "it is empty"), ("{\n", "line 1: not JSON")):
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(Mistake, match=cause):
            from_folder(tmp_path)


def test_an_answer_that_silence_matches_is_a_bad_row(tmp_path, undrawn):
    glimpse.heldout(1)[0].image.save(tmp_path / "0.png")
    answers = ["a", "?", ".", "\u732b", "-5"]
    (tmp_path / "data.jsonl").write_text("\n".join("{" + GOOD.replace('"a"', json.dumps(a)) + "}" for a in answers))
    for matches, lines in ((exact_match, [3]), (holds, [2, 3])):
        items, bad, _ = from_folder(tmp_path, matches)
        assert [line for line, _ in bad] == lines and all("holds no word" in cause for _, cause in bad)
        assert len(items) == len(answers) - len(lines)
    result = run(
        "--data", tmp_path, "--match", "contains", "--methods", "uniform", "--keep", 0.5, "--out", tmp_path / "out"
    )
    assert result.exit_code == 1 and "line 2: the answer" in result.stderr


@pytest.mark.parametrize(
    ("said", "answer", "found"),
    [
        ("It is -5 degrees.", "-5", True),
        ("It is \u22125 degrees.", "-5", True),
        ("x=-5", "-5", True),
        ("It is -5 degrees.", "5", False),
        ("5", "-5", False),
        ("from 3-5", "5", True),
        ("from 3-5", "-5", False),
        ("a well-known owl", "known owl", True),
        ("an owl", "a", False),
    ],
)
def test_contains_looks_for_words_and_signed_numbers(said, answer, found):
    assert holds(said, answer) == found


def test_a_count_draws_by_seed_and_keeps_the_order():
    items = from_glimpse(9)
    assert draw(items, None, 0) == draw(items, 20, 0) == items
    some = draw(items, 4, 0)
    assert [items.index(item) for item in some] == sorted(items.index(item) for item in some)
    assert some == draw(items, 4, 0) != draw(items, 4, 1)
