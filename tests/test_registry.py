"""Methods and families are found where they stand, and no plug-in can stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import foveate
from foveate.registry import PluginError, Registry

ROOT = Path(__file__).parents[1]
METHODS, FAMILIES = sys.modules["foveate.methods"], sys.modules["foveate.families"]
METHOD = """
from dataclasses import dataclass
from foveate.methods import register
from foveate.methods.base import EncoderMethod, scaled_layers, token_budget, topk_mask

@register({name!r})
@dataclass
class Brightest(EncoderMethod):
    keep: float | int = 0.5
    reads = frozenset({{"features"}})
    summary = "keeps the tokens of largest norm"
    source = "a test"

    def select(self, tokens, budget):
        return topk_mask(tokens.features.norm(dim=-1), budget)
"""
FAMILY = """
from foveate.families import register
from foveate.families.llava import Llava

@register
class Mine(Llava):
    model_type = {name!r}
"""


@pytest.fixture
def plugins(monkeypatch, tmp_path):
    """Puts modules and entry points in front of both registries, which know only what foveate brings."""
    entries: list[EntryPoint] = []
    for package in (METHODS, FAMILIES):
        known = package._registry.built_in()
        fresh = Registry(package._registry.what, package.__name__)
        fresh._known.update(known)
        monkeypatch.setattr(package, "_registry", fresh)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [e for e in entries if e.group == group])

    def add(name, code, group="foveate.methods", attribute=""):
        module = f"plugin_{name}"
        (tmp_path / f"{module}.py").write_text(code)
        entries.append(EntryPoint(name, module + attribute, group))

    yield add
    for module in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[module]


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "foveate"]


def test_a_plugin_is_a_method_like_any_other(plugins, caplog):
    plugins("brightest", METHOD.format(name="brightest"), attribute=":Brightest")
    assert "brightest" in foveate.methods() and {"fopru", "plphp"} <= set(foveate.methods())
    assert foveate.get_method("brightest", keep=3).keep == 3
    assert foveate.Method.from_dict({"method": "brightest", "keep": 0.25}).keep == 0.25
    assert not lines(caplog)
    assert "Brightest" not in foveate.__all__ and not hasattr(foveate, "Brightest")


BROKEN = {
    "syntax": ("norm = = 1", "SyntaxError: invalid syntax"),
    "missing": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "exits": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "lines": ("raise RuntimeError('one\\n\\ntwo')", "RuntimeError: one two"),
    "idle": ("x = 1", "ValueError: plugin_idle registers no method"),
    "taken": (METHOD.format(name="fopru"), "a method named 'fopru' is registered already, by foveate.methods.fopru"),
    "half": (
        METHOD.format(name="half") + METHOD.format(name="fopru"),
        "a method named 'fopru' is registered already, by foveate.methods.fopru",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_left_out(plugins, caplog, name):
    code, cause = BROKEN[name]
    plugins(name, code)
    plugins("brightest", METHOD.format(name="brightest"))
    assert foveate.methods() == sorted([*METHODS._registry.built_in(), "brightest"])
    assert foveate.method_class("fopru") is foveate.FoPru
    (line,) = lines(caplog)
    assert line.startswith(f"foveate: the plug-in {name} of an unknown distribution could not be loaded: ")
    assert cause in line and line.endswith("; it is left out") and "\n" not in line
    assert issubclass(PluginError, ValueError)
    with pytest.raises(PluginError, match=f"the plug-in {name} of .*Repair or uninstall it"):
        foveate.get_method(name)
    with pytest.raises(ValueError, match="unknown method 'nonsense'"):
        foveate.get_method("nonsense")
    assert len(lines(caplog)) == 1, "said once"


def test_a_plugin_cannot_take_the_name_of_a_built_in_by_being_imported_first():
    code = METHOD.format(name="fopru") + "print('never')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is registered already, by foveate.methods.fopru" in done.stderr and not done.stdout


def test_a_plugin_may_ask_what_there_is(plugins, caplog):
    plugins("brightest", "import foveate\nassert 'fopru' in foveate.methods()\n" + METHOD.format(name="brightest"))
    assert "brightest" in foveate.methods() and not lines(caplog)


def test_families_are_plugins_too(plugins, caplog):
    plugins("mine", FAMILY.format(name="mine"), "foveate.families", ":Mine")
    plugins("llava_again", FAMILY.format(name="llava"), "foveate.families")
    plugins("broken", "1 / 0", "foveate.families")
    assert foveate.families() == sorted([*FAMILIES._registry.built_in(), "mine"])
    assert foveate.get_family("mine").model_type == "mine"
    assert type(foveate.get_family("llava")).__name__ == "Llava"
    assert foveate.get_family("nonsense") is None
    assert [line.split(" of ")[0] for line in lines(caplog)] == [
        "foveate: the plug-in llava_again",
        "foveate: the plug-in broken",
    ]
    with pytest.raises(PluginError, match="ZeroDivisionError: division by zero"):
        foveate.get_family("broken")


@pytest.fixture
def installed(tmp_path):
    """The environment of a command beside an installed distribution whose plug-in cannot be imported."""
    info = tmp_path / "foveate_brightest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foveate-brightest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[foveate.methods]\nnorm = plugin_norm:Norm\n")
    (tmp_path / "plugin_norm.py").write_text("import no_such_module_at_all\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}


LEFT_OUT = (
    "foveate: the plug-in norm of foveate-brightest could not be loaded: ModuleNotFoundError: No module named "
    "'no_such_module_at_all'"
)


def test_commands_go_on_and_say_so_in_one_line(installed):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "foveate", *words], env=installed, capture_output=True, text=True)

    picture = str(ROOT / "examples/demo.png")
    done = run("ask", picture, "Where is the owl?", "-m", "fopru")  # it silences what upstream warns of
    assert done.returncode == 0 and done.stdout
    assert done.stderr.splitlines() == [f"{LEFT_OUT}; it is left out"]
    done = run("ask", picture, "Where is the owl?", "-m", "norm")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [f"{LEFT_OUT}; it is left out", f"{LEFT_OUT}. Repair or uninstall it"]


def test_importing_is_quick_and_names_come_from_the_registry():
    code = """
import sys
import foveate
assert not hasattr(foveate, "nothing") and not hasattr(foveate, "__wrapped__")
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "import foveate must be quick"
import foveate.commands.app
assert not {"torch", "transformers", "gradio"} & set(sys.modules), "every command imports what it needs when it runs"
from foveate import *
assert issubclass(FoPru, Method) and callable(prune) and families() and "transformers" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_class_of_a_method_is_a_name_of_the_package():
    classes = {foveate.method_class(name).__name__: foveate.method_class(name) for name in METHODS._registry.built_in()}
    others = {"Method", "PruneReport", "Pruned", "UnsupportedError", "prune"}
    functions = {"families", "get_family", "get_method", "method_class", "methods", "restore"}
    assert set(foveate.__all__) == {*classes, *others, *functions} <= set(dir(foveate))
    assert all(getattr(foveate, name) is cls for name, cls in classes.items())
    with pytest.raises(AttributeError, match="'foveate' has no attribute 'FoPruu'"):
        foveate.FoPruu  # noqa: B018


def test_only_fields_are_options():
    for option in ("kep", "name", "place", "sparse_attention"):
        with pytest.raises(
            ValueError, match=f"no option {option}; its options: keep, delta, alpha, beta, start_layer, rows$"
        ):
            foveate.get_method("plphp", **{option: 1})


def test_type_checkers_know_the_methods(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(
        "import foveate\n"
        "foveate.FoPru(keep=0.25)\n"
        "foveate.FoPru(kep=1)\n"
        "names: list[str] = foveate.methods() + foveate.families()\n"
        "foveate.Fopru\n"
    )
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT / 'src'}\nfollow_imports = silent\nignore_missing_imports = true\n"
        "[mypy-torch.*,transformers.*,numpy.*]\nfollow_imports = skip\n"  # slow, and not what is asked
    )
    done = subprocess.run([sys.executable, "-m", "mypy", "use.py"], cwd=tmp_path, capture_output=True, text=True)
    wrong = [line.split(": error: ")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert wrong == ["use.py:3", "use.py:5"], done.stdout + done.stderr
