"""The pages say what the code says, and no method is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

import foveate
from foveate.evaluation.results import Results
from foveate.evaluation.tables import markdown
from foveate.families.base import Family

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS.parent / "README.md", *DOCS.parent.glob("C*.md"), *DOCS.glob("*.md"), DOCS.parent / "training/README.md"]
RESULTS = sorted((DOCS.parent / "benchmarks/results").glob("*"))
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
    assert "<!-- family names -->" in (DOCS.parent / "README.md").read_text()
    assert "<!-- families -->" in (DOCS / "families.md").read_text()


def test_the_table_of_families_says_what_fits():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", generator().families_table(), flags=re.MULTILINE))
    del rows["model_type"]
    assert list(rows) == foveate.families()
    for model_type, methods in rows.items():
        named, family = set(re.findall(r"`(\w+)`", methods)), foveate.get_family(model_type)
        fitting = {name for name in foveate.methods() if foveate.method_class(name).place in family.places}
        if type(family).keys_and_values is Family.keys_and_values:  # its encoder has no room for further tokens
            fitting -= {"vistog"}
        if not family.shows_attention:
            fitting -= {"fopru", "vtc_cls", "visionzip", "scope", "quecc", "vistog", "fastvid", "holitom"}
        assert named == (set(foveate.methods()) - fitting if methods.startswith("all but") else fitting)


def test_the_stub_is_up_to_date():
    module = generator()
    assert module.STUB.read_text() == module.stub(), "run: python docs/generate.py"


def test_a_block_holds_what_its_command_prints(tmp_path):
    with Results(tmp_path / "eval", "eval", {}, keys=("method", "keep")) as results:
        results.add({"method": "fopru", "keep": 0.5, "accuracy": 0.75})
    block = f"<!-- foveate table {tmp_path}/eval --columns method,accuracy -->"
    (tmp_path / "page.md").write_text(f"before\n{block}\nold\n<!-- end -->\nafter\n")
    page = generator().renewed(tmp_path / "page.md")
    table = "| method | accuracy % |\n| --- | --: |\n| fopru | 75.0 |\n"
    assert page == f"before\n{block}\n{table}<!-- end -->\nafter\n"


def test_no_table_of_figures_was_made_by_hand():
    measured = (DOCS / "results.md").read_text()
    block = r"<!-- foveate table [^\n]* -->\n.*?<!-- end -->"
    assert re.search(block, measured, flags=re.DOTALL)
    by_hand = re.sub(block, "", measured, flags=re.DOTALL)
    assert [line for line in by_hand.splitlines() if "|" in line or "<td" in line] == []


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_every_recorded_result_is_a_folder_with_a_table(folder):
    assert (folder / "rows.csv").exists()
    assert markdown([folder]).count("\n") >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def untimed(page: str) -> list[str]:
    """Results of more than a minute that no text between the table or heading before and theirs gives the time of."""
    found = []
    table = r"((?:(?!^#|^<!-- end).*\n)+?)<!-- foveate table benchmarks/results/(\S+)"
    for about, name in re.findall(table, page, flags=re.MULTILINE):
        runs = json.loads((DOCS.parent / "benchmarks/results" / name / "run.json").read_text())["runs"]
        minutes = sum(run["seconds"] for run in runs) / 60
        if minutes > 1 and f"({minutes:.0f} min on 2 cores)" not in " ".join(about.split()):
            found.append(name)
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/measuring.md"])
def test_a_reader_measures_anew_and_is_told_how_long_it_takes(page):
    text = (DOCS.parent / page).read_text()
    prose = re.sub(r"<!-- foveate table [^\n]* -->", "", text)
    assert "--out benchmarks/" not in " ".join(prose.split()), "it would print rows that are there already"
    assert untimed(text) == []


def test_a_missing_time_is_seen():
    table = "<!-- foveate table benchmarks/results/proof -->\n<!-- end -->\n"
    page = f"# A\n\n`proof.py` (27 min on 2\ncores)\n\n{table}\n`proof.py`\n\n{table}"
    assert untimed(page) == ["proof"] and untimed(page.replace("27", "8", 1)) == ["proof"] * 2
    assert len(re.findall(r"min on 2\s+cores", (DOCS / "results.md").read_text())) >= 9
