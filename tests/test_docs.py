"""The pages say what the code says, and no method is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

import foveate
from foveate.evaluation.results import Results

DOCS = Path(__file__).parents[1] / "docs"
PARTS = ("**Formula.**", "**Costs.**", "**Weak where.**", "**Certainty.**")


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", foveate.methods())
def test_every_method_is_described(name):
    prose = (DOCS / "methods" / f"{name}.md").read_text()
    where = [prose.find(part) for part in PARTS]
    assert -1 not in where, f"docs/methods/{name}.md lacks one of {', '.join(PARTS)}"
    assert where == sorted(where)
    assert len(prose[: where[0]].split(". ")) >= 2, "the idea comes first"
    described = generator().meanings(foveate.method_class(name))
    options = [field.name for field in dataclasses.fields(foveate.method_class(name))]
    assert [option for option in options if not described.get(option)] == [], "the docstring explains every option"


def test_no_prose_without_a_method():
    files = {path.stem for path in (DOCS / "methods").glob("[!_]*.md")}
    assert files == set(foveate.methods())


def test_the_page_is_up_to_date():
    page = (DOCS / "methods.md").read_text()
    assert page == generator().page(), "run: python docs/generate.py"


def test_tables_are_up_to_date():
    module = generator()
    for path in module.PAGES:
        assert path.read_text() == module.renewed(path), "run: python docs/generate.py"
    assert "<!-- methods -->" in (DOCS.parent / "README.md").read_text()


def test_a_block_holds_what_its_command_prints(tmp_path):
    with Results(tmp_path / "eval", "eval", {}, keys=("method", "keep")) as results:
        results.add({"method": "fopru", "keep": 0.5, "accuracy": 0.75})
    block = f"<!-- foveate table {tmp_path}/eval --columns method,accuracy -->"
    (tmp_path / "page.md").write_text(f"before\n{block}\nold\n<!-- end -->\nafter\n")
    page = generator().renewed(tmp_path / "page.md")
    table = "| method | accuracy % |\n| --- | --: |\n| fopru | 75.0 |\n"
    assert page == f"before\n{block}\n{table}<!-- end -->\nafter\n"
