"""What a stranger does in the first hours, in sixty steps: each as it would be typed, and what must come back.

Installing, the README's own blocks, the notebook, the playground in a browser and the site have tests of their own.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app

ROOT = Path(__file__).parents[2]
OWL = ("demo.png", "Where is the owl?")


@dataclass(frozen=True)
class Step:
    """words: behind `foveate`. out, err: what must be said there. code: how it ends. files: what is there then."""

    does: str
    words: tuple[str, ...]
    out: tuple[str, ...] = ()
    err: tuple[str, ...] = ()
    code: int = 0
    files: tuple[str, ...] = field(default=())


def ask(does: str, *words: str, **expected) -> Step:
    return Step(does, ("ask", *words), **expected)


STEPS = [
    # The first five minutes.
    Step("asks for the version", ("--version",), (f"foveate {foveate.__version__}",)),
    Step("types nothing", (), (), ("Usage",), 2),
    Step("asks for help", ("-h",), ("ask", "eval", "playground", "env")),
    Step("asks what ask can do", ("ask", "-h"), ("--method", "--keep", "--compare")),
    Step("mistypes a command", ("asq",), (), ("No such command", "foveate --help"), 2),
    Step("says what machine this is", ("env",), ("torch", "transformers", "methods")),
    ask("asks the first question", *OWL, out=("bottom left", "divprune keep=0.25: 36 of 144 image tokens")),
    ask("compares", *OWL, "--compare", out=("untouched", "KV cache"), err=("too small to get faster",)),
    ask("wants numbers for a script", *OWL, "--json", out=('"answer": "bottom left"',)),
    ask("draws what stayed", *OWL, "--show", "kept.png", err=("wrote kept.png",), files=("kept.png",)),
    ask("shows a photograph", "photo.png", "What is this?", err=("knows nothing but drawn pictures",)),
    ask("asks in another language", "demo.png", "Wo ist die Eule?", err=("never learned",)),
    ask("asks about a clip", "clip.mp4", "What is in the clip?", "--max-frames", "4", out=("image tokens",)),
    # Which method?
    Step("lists the methods", ("methods",), ("divprune", "csp", "foveate methods NAME")),
    Step("asks about one", ("methods", "plphp"), ("delta=0.0", "how far attentive and indifferent layers move")),
    Step("writes it as the paper does", ("methods", "PLPHP"), ("plphp",)),
    Step("mistypes it", ("methods", "plph"), (), ("did you mean plphp?",), 2),
    Step("lists the families", ("families",), ("qwen2_5_vl", "such as")),
    Step("reads them by a script", ("families", "--json"), ('"model_type": "llava"',)),
    ask("tries another method", *OWL, "-m", "csp", out=("csp keep=0.2",)),
    ask("tries two of them", *OWL, "-m", "csp", "-m", "fastv", out=("csp keep 0.2", "fastv keep")),
    ask("lists them with a comma", *OWL, "-m", "csp,fastv", out=("csp keep 0.2", "fastv keep")),
    ask("joins two", *OWL, "-m", "divprune:keep=0.5+csp:keep=0.4", out=("28 of 144", "bottom left")),
    ask("sets an option", *OWL, "-m", "fopru", "-o", "strategy=row", out=("fopru",)),
    ask("keeps a number of tokens", *OWL, "--keep", "64", out=("64 of 144",)),
    ask("keeps one by mistake", *OWL, "--keep", "1", err=("keeps one token of each image",)),
    ask("keeps all", *OWL, "--keep", "1.0", out=("144 of 144", "bottom left")),
    ask("writes a percentage", *OWL, "--keep", "50%", err=("--keep 50% is no number",), code=2),
    ask("keeps too much", *OWL, "--keep", "1.5", err=("keep must be a float in (0, 1]",), code=2),
    ask("invents an option", *OWL, "-m", "csp", "-o", "size=2", err=("no option 'size': csp has keep",), code=2),
    ask("says keep twice", *OWL, "-m", "csp:keep=0.5", "--keep", "0.5", err=("give it once",), code=2),
    ask("takes what does not fit", *OWL, "-m", "trimmed_llama", err=("which llava models lack",), code=2),
    # Mistakes with files and models.
    ask("forgets the question", "demo.png", err=("no question",), code=2),
    ask("forgets the picture", "What is this?", err=("no image",), code=2),
    ask("names no file", "nowhere.png", "What?", err=("no such picture: nowhere.png",), code=2),
    ask("gives a text", "notes.png", "What?", err=("holds no picture",), code=2),
    ask("gives a web address", "https://x.org/a.png", "What?", err=("is a web address",), code=2),
    ask("has a strange device", *OWL, "--device", "tpu", err=("no device 'tpu' here",), code=2),
    ask("has a strange dtype", *OWL, "--dtype", "int8", err=("--dtype int8 is unknown",), code=2),
    ask("has strange attention", *OWL, "--attn", "fast", err=("--attn fast is unknown",), code=2),
    ask("has no such model", *OWL, "--model", "./nowhere", err=("no such model folder",), code=2),
    ask("draws into nowhere", *OWL, "--show", "no/such.png", err=("no folder no",), code=2),
    ask("wants a JPEG", *OWL, "--show", "kept.jpg", err=("must end in .png",), code=2),
    # Prove, look, measure.
    Step(
        "proves it",
        ("check", *OWL, "-m", "csp", "--steps", "2", "--out", "proof"),
        ("equal",),
        ("wrote proof",),
        files=("proof/rows.csv",),
    ),
    Step("proves two together", ("check", *OWL, "-m", "divprune+csp", "--steps", "2", "--json"), ('"equal": true',)),
    Step(
        "looks",
        ("show", *OWL, "-m", "csp", "--max-new-tokens", "2", "--out", "look"),
        ("bottom left",),
        files=("look/show.html", "look/attention.png"),
    ),
    Step("proves into nowhere", ("check", *OWL, "--out", "notes.png/a"), (), ("cannot write into the folder",), 2),
    Step(
        "evaluates",
        ("eval", "-m", "divprune", "--keep", "0.25", "--count", "2", "--out", "answers"),
        ("untouched", "divprune", "random"),
        files=("answers/answers.csv", "answers/run.json"),
    ),
    Step(
        "evaluates once more",
        ("eval", "-m", "divprune", "--keep", "0.25", "--count", "2", "--out", "answers"),
        ("divprune",),
        ("0 measured now",),
    ),
    Step(
        "adds a method",
        ("eval", "-m", "divprune+csp", "--keep", "0.25", "--count", "2", "--out", "answers"),
        ("divprune+csp",),
    ),
    Step(
        "evaluates other questions there", ("eval", "--count", "3", "--out", "answers"), (), ("give another --out",), 2
    ),
    Step("makes a table", ("table", "answers", "--columns", "method,accuracy"), ("| method |",)),
    Step("invents a column", ("table", "answers", "--columns", "beauty"), (), ("beauty",), 2),
    Step("brings data of nobody", ("eval", "--data", "nowhere", "--count", "2"), (), ("cannot read nowhere",), 2),
    Step(
        "times it",
        ("bench", "--model", "glimpse", "-m", "divprune", "--new-tokens", "2", "--repeat", "1", "--out", "times"),
        ("divprune",),
        files=("times/rows.json",),
    ),
    Step("times nothing", ("bench",), (), ("give either --geometry",), 2),
    Step("promises too much", ("calibrate", "--count", "10", "--out", "c.json"), (), ("questions",), 2),
    Step("serves what is no model", ("serve", "./nowhere", "--dry-run"), (), ("nowhere",), 2),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    for name in ("demo.png", "clip.mp4"):
        shutil.copy(ROOT / "examples" / name, folder / name)
    noise = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.png")
    (folder / "notes.png").write_text("milk, bread\n")
    return folder


def test_the_steps(desk, monkeypatch):
    monkeypatch.chdir(desk)
    wrong = []
    for number, step in enumerate(STEPS, start=1):
        result = CliRunner().invoke(app, list(step.words))
        out, err = (" ".join(text.split()) for text in (result.stdout, result.stderr))
        lacks = [f"stdout: {part}" for part in step.out if part not in out]
        lacks += [f"stderr: {part}" for part in step.err if part not in f"{err} {out if not step.words else ''}"]
        lacks += [f"file: {name}" for name in step.files if not (desk / name).is_file()]
        if result.exit_code != step.code or lacks or "Traceback" in err:
            wrong.append(f"{number}. {step.does}: ended with {result.exit_code}, lacks {lacks}\n{result.output[-800:]}")
    assert not wrong, "\n\n".join(wrong)


def test_the_last_two_in_python(tmp_path):
    """59: prunes in a program, and gets the model back. 60: keeps the method as a file."""
    model, processor = glimpse.load()
    turn = {"role": "user", "content": [{"type": "image", "image": Image.open(ROOT / "examples/demo.png")}]}
    turn["content"].append({"type": "text", "text": "Where is the owl?"})
    inputs = processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    before = model(**inputs).logits
    with foveate.prune(model, "divprune:keep=0.5+csp:keep=0.4") as pruned:
        said = model.generate(**inputs, max_new_tokens=8)
    assert "bottom left" in processor.decode(said[0], skip_special_tokens=True)
    assert "28 of 144" in str(pruned.report) and json.dumps(pruned.report.to_dict())
    assert torch.equal(model(**inputs).logits, before)
    foveate.DivPrune(keep=0.3).save_pretrained(tmp_path)
    assert foveate.Method.from_pretrained(tmp_path) == foveate.DivPrune(keep=0.3)
    assert len(STEPS) == 58
