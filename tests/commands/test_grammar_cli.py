"""One grammar in every command, what all of them understand, and what they say beside their results."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app
from foveate.commands.completion import complete_methods, complete_models, names
from foveate.commands.methods import _meanings
from foveate.errors import KeepsOneToken
from foveate.methods import option_names

DEMO, QUESTION = "examples/demo.png", "Where is the owl?"
BOTH = "divprune:keep=0.5+CSP:keep=0.4"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def well(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def test_methods_that_act_together_are_asked_and_timed_beside_others():
    out = json.loads(well("ask", DEMO, QUESTION, "-m", f"{BOTH},PLPHP", "-m", "fopru:back=1", "--json").stdout)
    both, plphp, fopru = out["answers"]
    assert both["method"] == "divprune+csp" and [each["options"] for each in both["methods"]] == [
        {"keep": 0.5},
        {"keep": 0.4},
    ]
    assert (plphp["method"], plphp["options"]) == ("plphp", {"keep": 0.4}) and "methods" not in plphp
    assert fopru["options"] == {"keep": 0.25, "back": 1}
    assert both["images"][0]["kept"] < 72 and both["answer"] == "bottom left"


def test_they_are_evaluated_and_timed_together(tmp_path, undrawn):
    words = ("--methods", BOTH, "-m", "divprune+csp", "--keep", 0.25, "--out", tmp_path / "eval", "--json")
    rows = json.loads(well("eval", *words, "--count", 4, "--max-new-tokens", 4).stdout)["rows"]
    found = {row["method"]: row for row in rows}
    assert found["divprune:keep=0.5+csp:keep=0.4"]["keep"] == 0.4 and found["divprune+csp"]["keep"] == 0.25
    assert found["divprune+csp"]["place"] == "encoder+cache"
    assert found["divprune+csp"]["kv_share"] < found["random"]["kv_share"]
    words = ("--model", "glimpse", "--methods", BOTH, "--new-tokens", 2, "--repeat", 1, "--out", tmp_path / "bench")
    (row,) = json.loads(well("bench", *words, "--json").stdout)["rows"]
    # What goes through the layers is what the first of them left, what the cache holds is what both did.
    assert row["place"] == "encoder+cache" and row["token_layers"] == 0.5 and row["kept_share"] < 0.25


def test_together_they_are_proven_and_drawn(tmp_path):
    out = json.loads(well("check", DEMO, QUESTION, "-m", BOTH, "--steps", 2, "--out", tmp_path / "a", "--json").stdout)
    assert [row["equal"] for row in out["rows"]] == [True, True]
    assert out["rows"][0]["method"] == "divprune keep 0.5 + csp keep 0.4"
    well("show", DEMO, QUESTION, "-m", BOTH, "--max-new-tokens", 2, "--out", tmp_path / "b")


@pytest.mark.parametrize("command", ["check", "show"])
def test_the_frames_that_were_asked_for_are_looked_at(command, tmp_path):
    few = ("--max-frames", 2, "-m", "divprune", "--out", tmp_path / "out")
    well(command, "examples/clip.mp4", "What is in the clip?", *few, *(["--steps", 1] if command == "check" else []))
    settings = json.loads((tmp_path / "out/run.json").read_text())["settings"]
    assert len(settings["pictures"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ask", DEMO, QUESTION, "-m", "plph"), "unknown method 'plph'; did you mean plphp?"),
        (("ask", DEMO, QUESTION, "-m", "fopru+"), "--method fopru+: write names"),
        (("ask", DEMO, QUESTION, "-m", "fopru:keep=0.5", "--keep", "0.5"), "keep: fopru:keep=0.5 says it already"),
        (("eval", "-m", "fopru+fopru", "--count", "1"), "fopru and fopru both act before the LLM"),
        (("calibrate", "-m", "fopru+csp", "--out", "x.json"), "give each method alone here"),
        (("calibrate", "-m", "csp:keep=0.5", "--out", "x.json"), "leave keep out"),
        (("search", "-m", "gsearch+csp", "--out", "x.json"), "one method is wanted here"),
        (("serve", "glimpse", "-m", "fopru,csp", "--dry-run"), "one method is wanted here"),
        (("methods", "magic"), "unknown method 'magic'"),
        (("ask", "-d"), "(see: foveate ask --help)"),
    ],
)
def test_mistakes_say_what_was_meant(words, says):
    result = run(*words)
    assert result.exit_code == 2 and says in result.stderr, result.output


def test_one_token_is_warned_of_and_all_are_not():
    assert "divprune keep=1 keeps one token of each image" in well("ask", DEMO, QUESTION, "--keep", "1").stderr
    assert "keep=1" not in well("ask", DEMO, QUESTION, "--keep", "1.0").stderr
    with pytest.warns(KeepsOneToken, match="divprune keep=1 keeps one token"):
        foveate.prune(glimpse.load("tiny")[0], "divprune", keep=1).remove()


def test_what_glimpse_never_learned_is_said_but_not_to_the_quiet(tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(photo)
    said = well("ask", photo, "What is a Löwe?", "--compare").stderr
    assert "glimpse knows nothing but drawn pictures" in said and "glimpse never learned 'Löwe'" in said
    assert "too small to get faster" in said
    assert well("ask", photo, "What is a Löwe?", "--compare", "--quiet").stderr == ""
    assert well("ask", DEMO, QUESTION).stderr == ""


def test_help_is_short_and_a_file_with_a_dash_is_explained(tmp_path, monkeypatch):
    assert well("ask", "-h").stdout == well("ask", "--help").stdout
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.png").touch()
    monkeypatch.setattr(sys, "argv", ["foveate", "ask", "-dash.png", "What?"])
    assert "write ./-dash.png" in run("ask", "-dash.png", "What?").stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_ends_in_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "foveate", "methods"]
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "foveate: no space is left where the output goes: free some, or write it elsewhere"
    ]


def test_one_method_is_said_in_full_and_every_option_of_every_method_has_a_meaning():
    said = " ".join(well("methods", "FoPru").stdout.split())
    assert "rank | row" in said and "how many encoder layers before the penultimate one are read" in said
    assert "fits" in said and "llava_next" in said
    row = json.loads(well("methods", "fopru", "--json").stdout)
    assert row["choices"] == {"strategy": ["rank", "row"], "attention": ["patches", "cls"]}
    for name in foveate.methods():
        cls = foveate.method_class(name)
        missing = [option for option in option_names(cls) if option not in _meanings(cls)]
        assert not missing, f"{name} does not say what {missing} mean"


def test_the_environment_is_told():
    found = json.loads(well("env", "--json").stdout)
    assert found["foveate"] == foveate.__version__ and {"torch", "transformers", "python", "cuda"} <= set(found)
    assert re.search(r"transformers\s+\d", well("env").stdout)


def test_names_are_completed_without_loading_anything():
    assert names("methods") == [name for name in foveate.methods() if name in names("methods")]
    assert set(names("methods")) == set(foveate.methods())
    assert complete_methods("plp") == ["plphp"] and complete_methods("fopru,div") == ["fopru,divprune"]
    assert complete_methods("divprune+cs") == ["divprune+csp"]
    assert complete_models("glimpse-") == ["glimpse-cross", "glimpse-video"]
    ask = "import sys; from foveate.commands import completion; completion.names('methods')"
    probe = f"{ask}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)
