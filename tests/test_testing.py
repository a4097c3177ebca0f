"""What `foveate.testing` passes, and that it sees every mistake of a method."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass

import pytest
import tiny
import torch

import foveate
from foveate import testing
from foveate.engine.session import Pruned
from foveate.methods import base
from foveate.methods.base import topk_mask
from foveate.registry import Registry
from foveate.testing import answers, families, features, merging, subjects

METHODS, TINY = sys.modules["foveate.methods"], sys.modules["foveate.testing.tiny"]
LLAVA = {"families": ["llava"]}


def test_a_method_passes_and_says_so_in_a_line_a_family():
    found = testing.check_method("divprune", keep=0.25, families=["llava", "qwen2_5_vl"])
    assert [(line.family, line.tokens, line.kept) for line in found.lines] == [("llava", 36, 9), ("qwen2_5_vl", 24, 6)]
    assert all(line.difference < 1e-4 for line in found.lines)
    first, second = str(found).splitlines()
    assert first.startswith("divprune on llava: keeps 9 of 36 image tokens, logits within ")
    assert second.startswith("divprune on qwen2_5_vl: keeps 6 of 24 image tokens, logits within ")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pages", "pooling", "fastvid", "zipvl")]


@pytest.mark.parametrize("name", ["fastv", "csp", "visionzip", *SLOW])
def test_methods_of_every_place_pass(name):
    (line,) = testing.check_method(name, keep=0.5, **LLAVA).lines
    assert line.difference is not None and line.difference < 1e-4


def test_what_nothing_can_imitate_is_said():
    (line,) = testing.check_method("mint", **LLAVA).lines
    assert line.difference is None and "not compared" in str(line)


def test_a_family_passes_with_methods_of_its_places(monkeypatch):
    few = {name: families.REPRESENTATIVES[name] for name in ("divprune", "pages", "trimmed_llama")}
    monkeypatch.setattr(families, "REPRESENTATIVES", few)
    found = {line.method: line for line in testing.check_family("llava").lines}
    assert found["divprune"].kept == 9 and found["pages"].difference is not None
    assert not found["trimmed_llama"].tokens and "does not fit" in str(found["trimmed_llama"])


def test_a_configuration_is_a_family_too(monkeypatch):
    monkeypatch.setattr(families, "REPRESENTATIVES", {"csp": dict(keep=0.5)})
    (line,) = testing.check_family("llava", tiny.config("llava")).lines
    assert (line.tokens, line.kept) == (36, 18)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_passes(family):
    testing.check_family(tiny.found[family].model_type)


READABLE = [name for name in tiny.found if "encoder" in foveate.get_family(tiny.found[name].model_type).places]


@pytest.mark.parametrize("name", READABLE)
def test_methods_are_shown_what_the_llm_sees(name):
    features.check_features(subjects.of_tiny(name))


@pytest.mark.parametrize(
    ("name", "words"), [("llama4", r"none is of shape \(9, 64\)"), ("molmo2", "nearest differ by")]
)
def test_a_family_that_hides_a_later_step_is_found(name, words, monkeypatch):
    monkeypatch.delattr(type(foveate.get_family(name)), "as_seen")
    with pytest.raises(AssertionError, match=words):
        testing.check_family(name)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="no tiny model named 'lava'"):
        testing.check_method("divprune", families=["lava"])
    with pytest.raises(ValueError, match="no family 'lava'"):
        testing.check_family("lava")
    with pytest.raises(foveate.UnsupportedError):
        testing.check_method("trimmed_llama", **LLAVA)
    with pytest.raises(AssertionError, match="this is a llava model"):
        testing.check_family("qwen2_5_vl", tiny.config("llava"))


# Negative controls: each of these is a mistake ------------------------------------------------------------------------


@pytest.fixture
def mine(monkeypatch):
    """Registers a class as the method `mine` until the test ends."""
    monkeypatch.setattr(METHODS._registry, "_known", dict(METHODS._registry.known()))

    def add(cls):
        cls.summary, cls.source = "a mistake", "a test"
        return METHODS.register("mine")(cls)

    return add


@dataclass
class Right(base.EncoderMethod):
    keep: float | int = 0.25
    reads = frozenset({"features"})

    def select(self, tokens, budget):
        return topk_mask(tokens.features.norm(dim=-1), budget)


@dataclass
class Greedy(Right):
    def select(self, tokens, budget):
        return super().select(tokens, 3 * budget)


@dataclass
class Nothing(Right):
    def select(self, tokens, budget):
        return super().select(tokens, 0 * budget)


@dataclass
class Floats(Right):
    def select(self, tokens, budget):
        return super().select(tokens, budget).float()


@dataclass
class Positions(Right):
    def select(self, tokens, budget):
        return tokens.features.norm(dim=-1).topk(int(budget.max())).indices


@dataclass
class Shape(Right):
    def select(self, tokens, budget):
        return super().select(tokens, budget)[:, :-1]


@dataclass
class Forgets(Right):
    reads = frozenset()


@dataclass
class Moody(Right):
    def select(self, tokens, budget):
        return topk_mask(torch.rand(tokens.features.shape[:2]), budget)


@dataclass
class Never(Right):
    """Drops even where all is to stay."""

    keeps_all = False

    def select(self, tokens, budget):
        return super().select(tokens, (budget // 2).clamp(min=1))


@dataclass
class Padding(base.LayerMethod):
    keep: float | int = 0.5

    def stages(self, depth):
        return (2,)

    def select(self, tokens):
        mask = topk_mask(tokens.last_attention().mean(1), base.floor_budget(self.share(tokens.groups), tokens.groups))
        return mask | ~tokens.groups.present


@dataclass
class LayerGreedy(Padding):
    def select(self, tokens):
        return tokens.groups.present.clone()


@dataclass
class Uneven(base.CacheMethod):
    keep: float | int = 0.5

    def select(self, scores, budget):
        mask = super().select(scores, budget)
        mask[:, 0, mask[0, 0].int().argmax()] = False
        return mask


@dataclass
class Clings(Right):
    """Leaves something behind in the model."""

    model = None

    def select(self, tokens, budget):
        with torch.no_grad():
            self.model.lm_head.weight.add_(1e-3)
        return super().select(tokens, budget)


MISTAKES = {
    Greedy: r"select keeps 27 tokens where the budget is 9",
    Nothing: r"select keeps nothing of an image",
    Floats: r"select returned float32 where booleans are wanted",
    Positions: r"select returned int64 where booleans are wanted",
    Shape: r"booleans of shape \(1, 35\) where \(tiles, n\) is \(1, 36\)",
    Forgets: r"it raises ValueError: mine failed \('NoneType' object has no attribute 'norm'\)\. It was not given .*",
    Moody: r"a second run of the same prompt keeps other tokens in layer 0",
    Never: r"with keep=1\.0 the logits differ from the untouched model's by",
    LayerGreedy: r"with keep=1\.0|nothing that matters was dropped|tokens of an image stay, where keep asks for 18",
    Uneven: r"more tokens in some heads than in others",
}


@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda cls: cls.__name__)
def test_a_mistake_is_seen(wrong, mine):
    mine(wrong)
    with pytest.raises(AssertionError, match=r"^mine on llava \(.*, (sdpa|eager) attention\): .*" + MISTAKES[wrong]):
        testing.check_method("mine", **LLAVA)


def test_the_right_method_passes(mine):
    mine(Right)
    assert testing.check_method("mine", keep=5, **LLAVA).lines[0].kept == 5


def test_kept_padding_is_seen(mine):
    mine(Padding)
    with pytest.raises(AssertionError, match=r"mine on qwen2_5_vl \(a padded batch, .* what is no token"):
        testing.check_method("mine", families=["qwen2_5_vl"])


def test_a_changed_model_is_seen(mine, monkeypatch):
    Clings.model = tiny.build("llava")
    monkeypatch.setattr(testing.subjects, "build", lambda name, attn: Clings.model)
    mine(Clings)
    with pytest.raises(AssertionError, match=r"lm_head\.weight has other values|logits differ"):
        testing.check_method("mine", **LLAVA)


def test_wrong_positions_are_seen(monkeypatch):
    """An engine that keeps other tokens than its report says."""
    told = Pruned.report.fget

    def shifted(self):
        report = told(self)
        if report is not None and report.records and "layers" not in vars(report):
            moved = [dataclasses.replace(x, kept=x.kept.roll(1, -1), seen=x.seen.roll(1, -1)) for x in report.layers]
            vars(report)["layers"] = moved
        return report

    monkeypatch.setattr(Pruned, "report", property(shifted))
    with pytest.raises(AssertionError, match=r"divprune on llava .* the logits differ from the reference's by"):
        testing.check_method("divprune", **LLAVA)


@pytest.mark.parametrize("name", ["visionzip", "pooling", "fastvid"])
def test_tokens_merged_otherwise_are_seen(name, monkeypatch):
    real = merging._of_images
    monkeypatch.setattr(
        merging, "_of_images", lambda *args: [(row, at, values.roll(1, 0)) for row, at, values in real(*args)]
    )
    with pytest.raises(AssertionError, match=rf"{name} on llava .* the logits differ from the reference's by"):
        testing.check_method(name, keep=0.5, **LLAVA)


def test_states_merged_otherwise_are_seen(monkeypatch):
    note = answers.Merges._note

    def wrong(self, *args):
        answer = note(self, *args)
        self.calls = [(tokens, keep, becomes + 0.1) for tokens, keep, becomes in self.calls]
        return answer

    monkeypatch.setattr(answers.Merges, "_note", wrong)
    with pytest.raises(AssertionError, match=r"sparsevlm on llava .* the logits differ from the reference's by"):
        testing.check_method("sparsevlm", recycle=0.5, **LLAVA)


# Tiny models of others ------------------------------------------------------------------------------------------------


def test_tiny_models_of_other_packages_are_found(monkeypatch, tmp_path):
    from importlib import metadata
    from importlib.metadata import EntryPoint

    (tmp_path / "plugin_tiny.py").write_text(
        "from foveate.testing.tiny.llava import Llava\n\n\nclass Mine(Llava):\n"
        '    """As LLaVA."""\n\n    name, model_type, variant = "mine", "llava", True\n'
    )
    fresh = Registry("tiny model", "foveate.testing.tiny")
    fresh._known.update(TINY.built_in())
    monkeypatch.setattr(TINY, "_registry", fresh)
    monkeypatch.syspath_prepend(tmp_path)
    entries = [EntryPoint("mine", "plugin_tiny", "foveate.testing.tiny")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: [e for e in entries if e.group == group])
    assert testing.check_method("random", families=["mine"]).lines[0].kept == 9


def test_importing_foveate_loads_none_of_it():
    code = "import sys, foveate\nassert 'foveate.testing' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
