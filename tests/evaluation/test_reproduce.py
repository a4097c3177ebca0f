"""foveate reproduce: plans that are refused with their key, a folder that goes on, and one table in the end."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from foveate import get_family
from foveate.asking.mistake import Mistake
from foveate.commands.app import app
from foveate.evaluation import bench, evaluate, geometries, lmms_tasks
from foveate.evaluation.plans import open_plan, shipped
from foveate.evaluation.reproduce import chosen_parts, reproduce
from foveate.evaluation.reproduce_report import Summary
from foveate.evaluation.results import read
from foveate.evaluation.tables import markdown
from foveate.evaluation.workplace import fitting

QUIET = Console(quiet=True)
PAPERS = [name for name in shipped() if name != "glimpse"]
SMALL = """
title = "A small one"
model = "glimpse"
methods = ["Div-Prune", "csp:keep=0.5+divprune:keep=0.25"]
keep = [0.25]
eval = { count = 4 }
bench = { new_tokens = 2, repeat = 1 }
expected = [
  { method = "untouched", figure = 97.5, what = "right, %", source = "somebody [2ND]" },
  { method = "divprune", keep = 0.25, figure = 90, what = "right, %", source = "somebody [2ND]" },
  { method = "divprune", keep = 0.25, figure = 1.5, what = "times faster", source = "somebody else [AUTH]" },
]
"""
BOTH = "csp:keep=0.5+divprune:keep=0.25"


def run(*args):
    return CliRunner().invoke(app, ["reproduce", *map(str, args)])


@pytest.fixture
def plan(tmp_path):
    """Writes a plan with some lines put in front, or replaced."""

    def write(*changes, text=SMALL):
        for change in changes:
            name = change.partition(" ")[0]
            text = text.partition("expected = [")[0] if name == "expected" else text
            text = "\n".join([change, *(line for line in text.splitlines() if not line.startswith(f"{name} "))])
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def no_plots(monkeypatch):
    """They take longest here, and the tests of eval and bench look at them."""
    for module in (evaluate, bench):
        monkeypatch.setattr(module, "_draw", lambda *args: None)


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("titel = 'x'", "titel is no key of a plan: did you mean title?"),
        ("methods = 'csp'", "methods must be a list of texts"),
        ("methods = []", "methods must be a list of texts, at least one"),
        ("methods = ['cps']", "methods: cps: unknown method 'cps'; did you mean csp?"),
        ("methods = ['csp', 'divprune:weight=2']", "methods: divprune:weight=2: "),
        ("methods = ['csp,divprune']", "one method is wanted here"),
        ("methods = ['all']", "name each one"),
        ("methods = ['csp:']", "methods, 'csp:': write names"),
        ("keep = 0.5", "keep must be a list of numbers"),
        ("keep = [1.5]", "keep: keep must be"),
        ("keep = [true]", "keep must be a list of numbers"),
        ("model = 7", "model must be a text"),
        ("model = './nowhere'", "model ./nowhere: no such folder"),
        ("model = 'owner/name'", "[eval] data is missing"),
        ("dtype = 'fp8'", "dtype must be one of auto, float32"),
        ("attn = 'fast'", "attn: --attn fast is unknown"),
        ("eval = 3", "eval must be a table"),
        ("eval = { cuont = 3 }", "[eval] cuont is no key of a plan: did you mean count?"),
        ("eval = { count = 0 }", "[eval] count must be a whole number of at least 1, not 0"),
        ("eval = { match = 'fuzzy' }", "[eval] match must be one of exact, contains"),
        ("eval = { data = 'nowhere' }", "[eval] data nowhere: no such folder"),
        ("bench = { batch = [1, 8] }", "[bench] batch must be a whole number"),
        ("lmms_eval = { limit = 5 }", "[lmms_eval] tasks is missing"),
        ("expected = [3]", "[[expected]] 1: must be a table"),
        ("expected = [{ method = 'csp' }]", "[[expected]] 1: what is missing"),
        (
            "expected = [{ method = 'csp', keep = 0.25, what = 'w', figure = 1, source = 's' }]",
            "[[expected]] 1: method csp is none of the plan's methods",
        ),
        (
            "expected = [{ method = 'divprune', keep = 0.5, what = 'w', figure = 1, source = 's' }]",
            "[[expected]] 1: keep 0.5 of divprune is none that the plan measures: 0.25",
        ),
        (
            "expected = [{ method = 'untouched', keep = 0.5, what = 'w', figure = 1, source = 's' }]",
            "[[expected]] 1: keep is of a method",
        ),
        ("= 3", "this is no TOML"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line_with_its_key(plan, change, said):
    path = plan(change)
    result = run(path, "--dry-run")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert f"{path}: " in result.output and said in result.output, result.output


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("methods", "methods is missing"),
        ("keep", "keep is missing"),
        ("model", "model is missing"),
        (("eval", "bench"), "nothing to run: give at least one of [eval], [bench], [lmms_eval]"),
    ],
)
def test_what_a_plan_must_have(plan, missing, said):
    text = "\n".join(line for line in SMALL.splitlines() if not line.startswith(missing))
    with pytest.raises(Mistake, match=f"mine.toml: .*{said}".replace("[", r"\[").replace("]", r"\]")):
        open_plan(str(plan(text=text)))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["glimps"], "no plan glimps: did you mean glimpse? give a TOML file, or one of glimpse, internvl3.5-8b"),
        (["glimpse", "--only", "evil"], "evil is no part: use eval, bench, tasks"),
        (["glimpse", "--only", "tasks"], "glimpse has no [lmms_eval]"),
        (["glimpse", "--data", "nowhere"], "[eval] data nowhere: no such folder"),
        (["glimpse", "--out", __file__], "cannot write into the folder"),
    ],
)
def test_mistakes_of_the_command(args, said):
    result = run(*args)
    assert result.exit_code == 2 and said in result.output, result.output


def test_options_stand_in_for_the_plan(plan, tmp_path):
    text = SMALL.replace('model = "glimpse"\n', "")
    opened = open_plan(str(plan(text=text)), model="glimpse-cross", data=str(tmp_path))
    assert (opened.model, opened.eval.data, opened.methods) == ("glimpse-cross", str(tmp_path), ["divprune", BOTH])


def test_all_plans_are_listed():
    assert shipped()[0] == "glimpse"
    shown = json.loads(run("--json").stdout)
    assert [each["name"] for each in shown] == shipped()
    assert all(name in run().stdout for name in shipped())


@pytest.mark.parametrize("name", PAPERS)
def test_a_shipped_plan_fits_its_model(name):
    """On the published architecture without weights: no download."""
    plan = open_plan(name)
    config = geometries.get_config(name)
    family = get_family(config)
    assert plan.model in family.examples
    chosen = plan.variants(family.places, config.model_type)
    left_out = []
    assert list(fitting(bench._sketch(config, None), chosen, left_out)) == chosen and not left_out
    assert plan.parts == ["eval", "bench", "tasks"]
    assert all(row.source.endswith(("[AUTH]", "[CODE]", "[2ND]")) for row in plan.expected)


# -- running ------------------------------------------------------------------------------------------------------


def test_a_dry_run_names_the_commands_and_does_nothing(tmp_path):
    result = run("glimpse", "--dry-run", "--out", tmp_path / "out")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# eval", "# bench"]
    assert lines[1].startswith("foveate eval --model glimpse --methods divprune,adaptinfer,csp --keep 0.25 --count 48")
    assert not (tmp_path / "out").exists()
    commands = json.loads(run("llava-1.5-7b", "--dry-run", "--json").stdout)
    assert "--keep 192,128,64" in commands["eval"][0]
    assert any("method=visionzip,keep=64 " in line for line in commands["tasks"])
    quoted = 'pretrained=llava-hf/llava-1.5-7b-hf,method="fastv:layer=3,keep=0.5"'
    assert any(quoted in shlex.split(line) for line in commands["tasks"])


def test_one_folder_that_goes_on_after_an_interrupt(plan, tmp_path, monkeypatch, no_plots):
    path, out = plan(), tmp_path / "out"
    measured = []

    def stop(*args, **kwargs):
        measured.append("bench")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench, "run", stop)
        assert run(path, "--out", out).exit_code == 130
    assert measured and "first token" not in (out / "summary.md").read_text()
    before = (out / "eval/rows.json").read_bytes()

    result = run(path, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "eval/rows.json").read_bytes() == before
    assert "0 measured now" in result.stderr

    head = ["accuracy %", "agreement %", "first token x untouched", "step x untouched", "kept %", "kv %", "reported"]
    page = (out / "summary.md").read_text()
    assert page.startswith("# A small one\n\n| method | keep | " + " | ".join(head) + " |\n")
    assert "| divprune | 0.25 |" in page and "| 90 [1], 1.5 [2] |" in page and "| 97.5 [1] |" in page
    assert "- [1] right, %: somebody [2ND]\n- [2] times faster: somebody else [AUTH]\n" in page
    assert "90 [1], 1.5 [2]" in result.stdout and "[2] times faster: somebody else [AUTH]" in result.stdout

    found = {(row["method"], row["keep"]): row for row in json.loads((out / "summary.json").read_text())["rows"]}
    rows, _ = read(out / "eval")
    times, _ = read(out / "bench")
    assert len(found) == len(rows)
    for row in rows:
        assert found[row["method"], row["keep"]]["accuracy"] == row["accuracy"]
        assert found[row["method"], row["keep"]]["kv_share"] == row["kv_share"]
    assert {row["method"] for row in times} == {"divprune", BOTH}
    for row in times:
        assert found[row["method"], row["keep"]]["first_token_x_untouched"] == row["ttft_vs_untouched"]
    assert "first_token_x_untouched" not in found["random", 0.25]
    assert "| divprune | 0.25 |" in markdown([out / "eval"], "method,keep,accuracy")

    again = json.loads(run(path, "--out", out, "--json", "--only", "eval").stdout)
    assert again["rows"] == list(found.values()) and set(again["parts"]) == {"eval", "bench"}
    assert run(path, "--dry-run", "--out", out).stdout.startswith(f"# eval, {len(rows)} rows are there\n")


def test_what_was_not_run_is_no_column(plan, tmp_path, no_plots):
    result = run(plan(), "--out", tmp_path / "out", "--only", "bench")
    assert result.exit_code == 0, result.output
    head = (tmp_path / "out/summary.md").read_text().splitlines()[2]
    assert head == "| method | keep | first token x untouched | step x untouched | kv % | reported |"
    assert not (tmp_path / "out/eval").exists()


# -- tasks --------------------------------------------------------------------------------------------------------

TASKS = 'lmms_eval = { tasks = ["pope", "gqa"], limit = 4 }'
STAND_IN = """
import json, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(words["--output_path"]) / "glimpse"
if "csp" in words["--model_args"] and not pathlib.Path("mended").exists():
    sys.exit("first line\\nthe device is out of memory")
assert words["--tasks"] == "pope,gqa" and words["--limit"] == "4", words
out.mkdir(parents=True)
pope = {"alias": "pope", "pope_accuracy,none": 0.5, "pope_accuracy_stderr,none": 0.1, "f1,strict": 0.25}
pope["f1_stderr_clt,none"] = 0.1
gqa = {"exact_match,none": len(words["--model_args"]) / 100, "exact_match_stderr,none": "N/A"}
(out / "20260101_results.json").write_text(json.dumps({"results": {"pope": pope, "gqa": gqa}}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Something that is called as lmms-eval is, and fails for csp until there is a file `mended`."""
    package = tmp_path / "site/lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.chdir(tmp_path)


def test_tasks_are_asked_of_each_variant(plan, tmp_path, stand_in):
    path, out = plan(TASKS), tmp_path / "out"
    result = run(path, "--out", out, "--only", "tasks")
    assert result.exit_code == 1, result.output
    assert "the device is out of memory" in result.stderr and "1 rows are missing" in result.stderr
    rows, about = read(out / "tasks")
    assert [row["method"] for row in rows] == ["untouched", "divprune"] and not about["finished"]
    assert rows[0]["gqa exact_match"] == len("pretrained=glimpse") / 100
    assert rows[1]["gqa exact_match"] == len("pretrained=glimpse,method=divprune,keep=0.25") / 100

    Path("mended").touch()
    result = run(path, "--out", out, "--only", "tasks")
    assert result.exit_code == 0, result.output
    assert "2 rows kept" in result.stderr
    head = (out / "summary.md").read_text().splitlines()[2]
    columns = ["pope pope accuracy", "pope f1 (strict)", "gqa exact match"]
    assert head == f"| method | keep | {' | '.join(columns)} | reported |"
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [list(row["tasks"]) for row in rows] == [["pope pope_accuracy", "pope f1 (strict)", "gqa exact_match"]] * 3


def test_without_lmms_eval_the_rest_goes_on(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lmms_tasks, "installed", lambda: False)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: (None, []))
    opened = replace(open_plan(str(plan(TASKS))), bench=None)
    assert chosen_parts(opened, None) == ["eval", "tasks"]
    console = Console(record=True, width=200)
    assert reproduce(opened, ["eval", "tasks"], out=tmp_path / "out", device="cpu", console=console) == []
    assert "tasks are left out: lmms-eval is not installed here: pip install lmms-eval==" in console.export_text()
    assert Summary.of(opened, tmp_path / "out").rows == []
    with pytest.raises(Mistake, match="pip install lmms-eval"):
        chosen_parts(opened, "tasks")


def test_the_command_loads_nothing_heavy():
    code = "import sys, foveate.commands.reproduce; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
