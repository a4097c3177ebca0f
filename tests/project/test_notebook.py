"""The notebook runs from top to bottom, as a reader would run it, and holds nothing of a machine."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/foveate.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder without the files beside the notebook, and figures that are drawn and not shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: matplotlib.pyplot.gcf().canvas.draw())
    yield tmp_path
    matplotlib.pyplot.close("all")


def test_every_cell_runs(somewhere, capsys):
    matplotlib.use("Agg")
    names: dict = {"__name__": "__main__"}
    for number, source in enumerate(CODE):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert names["restored"] == names["untouched"] != names["short"]
    assert set(names["reports"]) == {"divprune", "fastv", "plphp", "pages"}
    curves = names["curves"]
    assert names["whole"] >= 0.9 and curves["divprune"][2] > curves["random"][2], "a quarter well chosen beats a draw"
    printed = capsys.readouterr().out
    assert "36 of 144 image tokens" in printed and "KV cache: " in printed and printed.count("from the reference") == 3
    assert not list(somewhere.iterdir()), "it leaves no files"


def test_it_is_clean():
    for cell in CELLS:
        assert cell["metadata"] == {} and not cell.get("outputs") and cell.get("execution_count") is None
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|content|Users)/", NOTEBOOK.read_text("utf-8"))
    for source in CODE:
        ast.parse(source)  # no magic that needs a notebook


def test_its_links_lead_somewhere():
    prose = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert links and [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
