"""The navigation of the site names every page; `make docs` builds it and follows every link."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MADE = {  # by docs/site.py, of the README and others
    "index.md", "which-method.md", "methods/index.md", "reference.md", "training.md", "contributing.md", "changelog.md",
}  # fmt: skip


def pages(nav: Any) -> Iterator[str]:
    for each in nav if isinstance(nav, list) else nav.values():
        if isinstance(each, str):
            yield each
        else:
            yield from pages(each)


def test_the_navigation_names_every_page_once():
    named = sorted(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert named == sorted(MADE | {path.name for path in (ROOT / "docs").glob("*.md")} - {"methods.md"})


def test_the_site_reads_from_nowhere_else():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False and settings["strict"] is True
    assert not [path for path in settings["extra_css"] if "//" in path] and "extra_javascript" not in settings


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs what make docs installs")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "methods/divprune.html").exists() and "<math" in (tmp_path / "methods/fopru.html").read_text()
