"""The scripts that measure still fit the code that they measure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from rich.console import Console

import foveate

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """As a script finds its neighbours."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_started(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    assert callable(script.main)


def test_every_method_is_proven():
    assert {name for _, name, _, _ in importlib.import_module("proof").rows()} == set(foveate.methods())


@pytest.mark.parametrize("name", ["zipvl", "elastic_cache", "visionzip", "last_step", "evs", "quecc", "holitom"])
def test_each_kind_of_reference_is_there(name):
    case = next(case for _, method, _, case in importlib.import_module("proof").rows() if method == name)
    largest, at_one = case("one", "sdpa", "greedy")
    assert 0 < largest < 1e-4 and not at_one


def test_what_choosing_costs_is_timed_of_every_method_or_said_where():
    selection = importlib.import_module("selection")
    console = Console(record=True, width=200)
    timed = list(selection.wanted(",".join(foveate.methods()), 0.25, console))
    assert all(isinstance(method, tuple(base for base, _ in selection.WORK)) for _, method in timed)
    assert len(timed) + console.export_text().count("left out: ") == len(foveate.methods())
