"""`foveate serve` up to the start of vLLM, which is tested in tests/served."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app

GLIMPSE = str(glimpse.PATH)


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *words])
    return result.exit_code, result.output


def started(*words: str) -> list[str]:
    """The command that a dry run prints."""
    code, said = run(GLIMPSE, "--dry-run", *words)
    assert code == 0, said
    (command,) = (line for line in said.splitlines() if line.startswith("vllm "))
    return shlex.split(command)


def overrides(command: list[str]) -> dict:
    return json.loads(command[command.index("--hf-overrides") + 1])


def test_it_says_the_saving_and_the_command() -> None:
    code, said = run(GLIMPSE, "--method", "visionzip", "--keep", "0.25", "--dry-run", "--", "--port", "9000")
    assert code == 0
    assert re.search(r"640 x 480\s+144 -> 36\s+\(25%\)", said)
    command = started("--method", "visionzip", "--keep", "0.25", "--", "--port", "9000")
    assert command[:3] == ["vllm", "serve", GLIMPSE] and command[-2:] == ["--port", "9000"]
    assert overrides(command) == {"foveate": {"method": "visionzip", "keep": 0.25}}
    assert "--trust-request-mm-kwargs" not in command


def test_a_range_is_open_to_requests() -> None:
    command = started("--lowest", "0.1", "--highest", "1.0", "--positions", "compact", "-m", "FoPru:back=1")
    assert overrides(command)["foveate"] == {
        "method": "fopru",
        "keep": 0.25,
        "back": 1,
        "lowest": 0.1,
        "highest": 1.0,
        "positions": "compact",
    }
    assert "--trust-request-mm-kwargs" in command


def test_other_overrides_go_along() -> None:
    command = started("--", "--hf-overrides", '{"a": 1}', "--hf-overrides={}")
    assert overrides(command)["foveate"]["method"] == "divprune"
    command = started("--", "--hf-overrides", '{"a": {"b": 1}}', "--port", "1")
    assert overrides(command)["a"] == {"b": 1} and command.count("--hf-overrides") == 1


def test_a_saved_method_is_served(tmp_path: Path) -> None:
    foveate.DivPrune(keep=32).save_pretrained(tmp_path)
    assert overrides(started("--config", str(tmp_path))) == {"foveate": {"method": "divprune", "keep": 32}}
    assert overrides(started("--config", str(tmp_path), "--keep", "16"))["foveate"]["keep"] == 16
    code, said = run(GLIMPSE, "--dry-run", "--config", str(tmp_path), "--method", "fopru")
    assert code != 0 and "leave one of them out" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "plphp"), "transformers"),
        (("--method", "nothing"), "nothing"),
        (("--keep", "2.0"), "keep must be"),
        (("--lowest", "0.5"), "lowest"),
        (("--config", "nowhere"), "nowhere"),
        (("--", "--hf-overrides", "{"), "JSON"),
        (("--", "--hf-overrides", '{"foveate": {}}'), "writes itself"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], says: str) -> None:
    code, said = run(GLIMPSE, "--dry-run", *words)
    assert code == 2 and says in said and said.strip().count("\n") == 0


def test_models_that_are_not_served() -> None:
    code, said = run(str(glimpse.CROSS_PATH), "--dry-run")
    assert code == 2 and "foveate serves" in said


def test_without_vllm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, find=importlib.util.find_spec: None if name == "vllm" else find(name)
    )
    code, said = run(GLIMPSE)
    assert code == 2 and "pip install" in said
