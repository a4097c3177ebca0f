"""The example of a plug-in as a stranger would use it: built, installed, found by the commands, tested by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples/plugin"
FILES = ("foveate_unlike.py", "pyproject.toml", "test_unlike.py")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One in which the plug-in is installed."""
    pytest.importorskip("hatchling")
    out, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, PLUGIN)
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, *out.glob("*.whl"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT / "src")])}


def test_commands_know_it(environment):
    foveate = (sys.executable, "-m", "foveate")
    assert '"unlike"' in run(*foveate, "methods", "--json", env=environment)
    told = run(*foveate, "methods", "unlike", env=environment)
    assert "the package foveate_unlike" in " ".join(told.split()) and "docs/methods" not in told
    said = run(*foveate, "ask", ROOT / "examples/demo.png", "Where is the owl?", "-m", "unlike", env=environment)
    assert said.startswith("bottom left\nunlike keep=0.25: 36 of 144 image tokens")


def test_its_own_tests_pass(environment, tmp_path):
    (tmp_path / "test_unlike.py").write_text((PLUGIN / "test_unlike.py").read_text())
    assert "2 passed" in run(sys.executable, "-m", "pytest", "-q", "test_unlike.py", cwd=tmp_path, env=environment)


def test_the_page_shows_all_of_it():
    page = (ROOT / "docs/adding-a-method.md").read_text()
    assert sorted(path.name for path in PLUGIN.iterdir() if path.is_file()) == sorted(FILES)
    for name in FILES:
        assert f"\n{(PLUGIN / name).read_text()}```\n" in page, f"{name} has changed: show it anew"
