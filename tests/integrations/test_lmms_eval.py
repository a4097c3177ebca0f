"""lmms-eval finds foveate through its entry point and evaluates a pruned glimpse on a task of its own, offline.

    pytest -m slow tests/test_lmms_eval.py

Installs lmms-eval into an environment of its own, on top of this one: its list of dependencies includes a torchvision
that fits no CPU build of torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from foveate import glimpse

TASK = Path(__file__).parent / "lmms_eval_task"
COUNT = 18
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lmms_eval")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-r", TASK / "requirements.txt"], check=True)
    subprocess.run([*pip, "--no-deps", "lmms-eval==0.7.3"], check=True)
    return folder / "bin" / "python"


def evaluate(python: Path, folder: Path, model_args: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "lmms_eval", "--model", "foveate", "--model_args", model_args, "--tasks", "glimpse_tiny"]
    return run_python(
        python, folder, *words, "--include_path", TASK, "--batch_size", 6, "--output_path", folder / "out"
    )


def run_python(python: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    # lmms-eval reads the data's path as it stands, so it must be found from the folder it runs in.
    questions = glimpse.heldout(COUNT, kinds=glimpse.KINDS[:8])  # one picture and few words, as the task has them
    rows = [{"index": i, "question": q.question, "answer": q.answer} for i, q in enumerate(questions)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [python, *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "home")}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=os.environ | offline, capture_output=True, text=True
    )


def accuracy(folder: Path) -> float:
    (result,) = (folder / "out").rglob("*results.json")
    return json.loads(result.read_text())["results"]["glimpse_tiny"]["exact_match,none"]


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [("", 0.9, 1.0), (",method=plphp,keep=0.5", 0.6, 1.0), (",method=uniform,keep=3", 0.0, 0.5)],
)
def test_a_pruned_model_answers_a_task(python, tmp_path, method, low, high):
    run = evaluate(python, tmp_path, f"pretrained=glimpse{method}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert low <= accuracy(tmp_path) <= high


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("method=nonsense", "unknown method"),
        ("method=plphp,keep=1.5", "keep must be"),
        ("method=trimmed_llama", "methods that fit"),
        ("keep=0.5", "no method"),
    ],
)
def test_mistakes_are_named(python, tmp_path, arguments, reason):
    run = evaluate(python, tmp_path, f"pretrained=glimpse,{arguments}")
    assert reason in run.stdout + run.stderr
    assert not list((tmp_path).rglob("*results.json"))


def test_a_plan_asks_a_task_of_each_of_its_methods(python, tmp_path):
    plan = tmp_path / "plan.toml"
    table = f"[lmms_eval]\ntasks = ['glimpse_tiny']\nbatch_size = 6\ninclude_path = '{TASK}'\n"
    plan.write_text(f"model = 'glimpse'\nmethods = ['plphp:delta=0.2,start_layer=1']\nkeep = [0.5]\n{table}")
    command = [python, tmp_path, "-m", "foveate", "reproduce", plan, "--out", tmp_path / "out"]
    run = run_python(*command)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "out/summary.json").read_text())["rows"]
    found = {row["method"]: row["tasks"]["glimpse_tiny exact_match"] for row in rows}
    assert found["untouched"] >= 0.9 and 0.6 <= found["plphp:delta=0.2,start_layer=1"] <= 1.0
    assert "2 rows kept" in run_python(*command).stderr  # nothing is asked twice
