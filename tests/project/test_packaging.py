"""What the wheel holds, and that the two commands and the documentation agree with the code."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import foveate
from foveate.evaluation.plans import shipped

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network by the hatchling at hand."""
    pytest.importorskip("hatchling")
    # A copy, so that files of the checkout that git ignores cannot slip in by being listed there.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_all_code_and_glimpse(wheel):
    held = {name for name in wheel.namelist() if name.startswith("foveate/")}
    code = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/foveate").rglob("*.py")}
    assert code <= held
    assert {
        "foveate/py.typed",
        "foveate/__init__.pyi",
        "foveate/playground/answers.html",
        "foveate/playground/page.css",
        "foveate/glimpse/sprites.png",
        "foveate/glimpse/NOTICE.md",
    } <= held
    for part in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "processor_config.json"):
        assert {f"foveate/glimpse/model/{part}", f"foveate/glimpse/video/{part}"} <= held
    plans = {f"foveate/plans/{name}.toml" for name in shipped()}
    assert len(plans) == 7 and plans <= held
    assert {"foveate/glimpse/small/config.json", "foveate/glimpse/small/model.safetensors"} <= held
    assert not any("__pycache__" in name for name in held)
    assert not any(name.split("/")[0] in ("tests", "training", "benchmarks") for name in wheel.namelist())


def test_wheel_stays_small(wheel):
    assert sum(info.compress_size for info in wheel.infolist()) < 20e6


def test_wheel_says_what_it_is(wheel):
    info = f"foveate-{foveate.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch" in metadata
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())
    assert "foveate = foveate.__main__:run" in wheel.read(f"{info}/entry_points.txt").decode()


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "exec make test" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_pages_name_every_method_and_family():
    readme, methods = (ROOT / "README.md").read_text(), (ROOT / "docs/methods.md").read_text()
    assert [name for name in foveate.families() if f"`{name}`" not in readme] == []
    assert [name for name in foveate.methods() if f"| `{name}` |" not in methods] == []
    assert len(readme.encode()) < 7000, "a first visit is short; the rest stands in docs"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/methods.md", "docs/adding-a-family.md"])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_changelog_has_this_version():
    assert f"## [{foveate.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
