"""`foveate check` proves what is right on a user's own model, and exposes engines and methods that are not."""

import json
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

import foveate
from foveate import glimpse
from foveate.commands.app import app
from foveate.engine import forward as forward_module
from foveate.engine.cache import PrunedLayer
from foveate.engine.forward import Forward
from foveate.engine.report import PruneReport
from foveate.engine.session import Pruned
from foveate.evaluation import proving
from foveate.evaluation.attention import last_token_attention
from foveate.evaluation.proving import cannot_prove, prove
from foveate.methods.base import CacheMethod
from foveate.methods.fopru import FoPru

QUESTION = "Where is the owl?"
PICTURE = "examples/demo.png"
# A sample of every place where tokens go, and the method whose dropped rows fall silent.
METHODS = {
    "fopru": dict(keep=0.25),
    "fastv": dict(keep=0.5, layer=2),
    "pyramiddrop": dict(keep=0.25),
    "plphp": dict(keep=0.5, start_layer=1),
    "zipvl": dict(keep=0.5),
}
COMBINED = (("fopru", dict(keep=0.5)), ("fastv", dict(keep=0.5, layer=2)), ("plphp", dict(keep=0.5)))


def build(*named):
    return [foveate.get_method(name, **options) for name, options in named]


def proof(family, methods, *, attn="sdpa", batch="one", steps=5):
    return prove(tiny.build(family, attn), tiny.inputs(family, **tiny.BATCHES[batch]), methods, steps=steps)


# -- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.sampled(5)
def test_a_method_that_drops_is_proven(family, name, attn):
    found = proof(family, build((name, METHODS[name])), attn=attn)
    assert found.holds and found.same_tokens and not found.blind and not found.faults
    assert len(found.steps) == 5
    assert found.difference < 1e-4 < 1e-2 < max(step.unhidden for step in found.steps)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_cross_attention_is_proven(attn):
    found = proof("mllama", build(("trimmed_llama", dict(keep=0.1))), attn=attn)
    assert found.holds and found.same_tokens and not found.blind
    assert found.report.kv_bytes < found.report.kv_bytes_unpruned


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("batch", tiny.BATCHES)
def test_methods_together_and_batches_are_proven(family, batch):
    found = proof(family, build(*COMBINED), batch=batch)
    assert found.holds and not found.blind and not found.faults


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("batch", tiny.BATCHES)
@pytest.mark.parametrize("options", [dict(router="random"), dict(router="learned")], ids=lambda o: o["router"])
def test_tokens_that_skip_layers_are_proven(family, batch, options):
    methods = [foveate.VideoLLMMoD(keep=0.25, **options).untrained(), *build(("fopru", dict(keep=0.5)))]
    found = proof(family, methods, batch=batch)
    assert found.holds and found.same_tokens and not found.blind and not found.faults


def test_skipping_that_is_reported_wrongly_is_exposed(monkeypatch):
    right = PruneReport.layers.func

    def shifted(self):
        layers = right(self)
        return [replace(a, taken=None if a.taken is None else a.taken.roll(1, dims=-1)) for a in layers]

    assert proof("llava", [foveate.VideoLLMMoD(keep=0.25, router="random")]).holds
    monkeypatch.setattr(PruneReport, "layers", property(shifted))
    assert not proof("llava", [foveate.VideoLLMMoD(keep=0.25, router="random")]).holds


def test_keeping_everything_holds_and_says_that_it_proves_nothing():
    found = proof("llava", [FoPru(keep=1.0)])
    assert found.holds and found.blind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_limit_of_its_own(dtype):
    model = tiny.build("llava").to(dtype)
    batch = tiny.inputs("llava", **tiny.BATCHES["one"])
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    found = prove(model, batch, [FoPru(keep=0.25)], steps=4)
    assert found.holds and not found.blind
    assert found.tolerance == pytest.approx(24 * torch.finfo(dtype).eps * found.scale)
    assert found.tolerance > 1e-2


def test_the_model_is_left_as_it_was():
    model, batch = tiny.build("llava", "sdpa"), tiny.inputs("llava", **tiny.BATCHES["one"])
    before = model(**batch).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    prove(model, batch, [FoPru(keep=0.25)], steps=2)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch).logits, before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_methods_that_merge_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(proving, "generate", None)
    for name, options in (
        ("visionzip", {}),
        ("pooling", {}),
        ("elastic_cache", {}),
        ("sparsevlm", dict(recycle=0.3)),
        ("mint", {}),
    ):
        with pytest.raises(foveate.UnsupportedError, match=f"{name} does more than drop"):
            prove(None, {}, build((name, options)))
    with pytest.raises(foveate.UnsupportedError, match="exit_threshold sgl may drop nothing"):
        prove(None, {}, build(("sgl", dict(guide=object(), exit_threshold=1.0))))
    assert cannot_prove(build(("sparsevlm", {}), ("zipvl", {}))) is None
    assert cannot_prove(build(("visionzip", dict(keep=1.0)))) is None


@pytest.mark.parametrize("name", foveate.methods())
@pytest.mark.sampled(5)
def test_every_method_is_proven_or_refused(name):
    """Also those that come later."""
    cls = foveate.method_class(name)
    family = "mllama" if cls.place == "cross" else "llava"
    small = {"guide": tiny.build(family, seed=1)} if "guide" in cls.__dataclass_fields__ else {}
    keep = 4 if isinstance(cls.__dataclass_fields__["keep"].default, int) else 0.5  # of some, weights fix the number
    method = foveate.get_method(name, keep=keep, **small).untrained()
    if cannot_prove([method]):
        assert not method.only_drops
    else:
        assert proof(family, [method], steps=3).holds


# -- what is wrong --------------------------------------------------------------------------------------------------


def broken(family="llava", name="plphp", **options):
    return proof(family, build((name, METHODS.get(name, {}) | options)))


def test_a_report_of_other_tokens_is_exposed(monkeypatch):
    """The engine keeps one token and reports its neighbour."""
    right = PruneReport._kept

    def shifted(self, layer):
        kept = right(self, layer)
        return kept.roll(1, dims=-1) if kept.shape[1] > 1 else kept

    monkeypatch.setattr(PruneReport, "_kept", shifted)
    found = broken()
    assert not found.holds and not found.faults
    assert found.difference > 1000 * found.tolerance
    assert found.steps[0].difference < found.tolerance, "the prefill was right"


def test_an_encoder_choice_that_is_reported_wrongly_is_exposed(monkeypatch):
    right = PruneReport._seen
    monkeypatch.setattr(PruneReport, "_seen", lambda self, layer: right(self, layer).roll(1, dims=-1))
    found = broken(name="fopru")
    assert not found.holds
    assert found.steps[0].difference > 1000 * found.tolerance


def test_a_cross_attention_choice_that_is_reported_wrongly_is_exposed(monkeypatch):
    right = PruneReport._kept
    monkeypatch.setattr(PruneReport, "_kept", lambda self, layer: right(self, layer).roll(1, dims=-1))
    assert not broken("mllama", "trimmed_llama", keep=0.1).holds


@dataclass
class Shared(CacheMethod):
    """One choice for all heads, so that a mask can hide what a broken engine does not free."""

    name = "shared"
    keep: float = 0.5

    def score(self, tokens):
        return tokens.last_attention().mean(1, keepdim=True)


def test_masking_instead_of_freeing_is_exposed(monkeypatch):
    """Attention hides what should have gone: the logits are right, the memory is not."""

    def only_note(self, mask, visible=None):
        self.noted = mask[:, :1]
        self.index = torch.arange(self.length).expand(len(mask), 1, -1)
        return True

    def visible(self, layer, keys):
        if not self.past or not hasattr(layer, "noted"):
            return None
        return torch.nn.functional.pad(layer.noted, (0, keys - layer.noted.shape[-1]), value=True)

    right = PruneReport.__init__

    def claim(self, forward, *args):
        right(self, forward, *args)
        self.claimed = [layer.noted for layer in forward.cache.layers]

    monkeypatch.setattr(PrunedLayer, "keep", only_note)
    monkeypatch.setattr(Forward, "visible", visible)
    monkeypatch.setattr(PruneReport, "__init__", claim)
    monkeypatch.setattr(PruneReport, "_kept", lambda self, layer: self.claimed[layer])
    found = proof("llava", [Shared()])
    assert found.difference < found.tolerance and not found.blind
    assert not found.holds
    assert len(found.faults) == 4 and all("not freed" in fault for fault in found.faults)


def test_a_view_of_the_whole_cache_is_exposed(monkeypatch):
    """Short tensors whose storage is as long as ever."""
    right = PrunedLayer.keep

    def keep(self, mask, visible=None):
        length, choice = self.keys.shape[2], right(self, mask, visible)
        room = torch.zeros(*self.keys.shape[:2], length, self.keys.shape[3])
        room[:, :, : self.keys.shape[2]] = self.keys
        self.keys = room[:, :, : self.keys.shape[2]]
        return choice

    monkeypatch.setattr(PrunedLayer, "keep", keep)
    found = proof("llava", [Shared()])
    assert found.difference < found.tolerance
    assert not found.holds and "not freed" in found.faults[0]


def test_bytes_that_are_made_up_are_exposed(monkeypatch):
    right = PruneReport.__init__

    def boast(self, *args):
        right(self, *args)
        self.kv_bytes //= 2

    monkeypatch.setattr(PruneReport, "__init__", boast)
    found = proof("llava", build(("plphp", METHODS["plphp"])))
    assert not found.holds
    assert found.faults == (f"the report says that the KV cache has {found.report.kv_bytes} bytes, "
                            f"but it has {2 * found.report.kv_bytes}",)  # fmt: skip


@pytest.mark.parametrize("name", ["fopru", "fastv"])
def test_positions_off_by_one_are_exposed(name, monkeypatch):
    """Of the rows that stay while the prompt is read."""
    right = forward_module.gather_rows

    def shifted(tensor, source):
        is_rope = tensor.shape[-1] == 16  # not the hidden size
        return right(tensor, (source + 1).clamp(max=tensor.shape[1] - 1) if is_rope else source)

    monkeypatch.setattr(forward_module, "gather_rows", shifted)
    found = proof("llava", build((name, METHODS[name])))
    assert not found.holds and not found.faults
    assert found.difference > 100 * found.tolerance


def behind_by_one(monkeypatch):
    """Let generated tokens stand one position too early, as if the cache's length were miscounted."""
    right = Pruned._begin

    def begin(self, args, kwargs):
        kwargs, forward = right(self, args, kwargs)
        if forward is not None and forward.forward.past:
            kwargs["position_ids"] = kwargs["position_ids"] - 1
        return kwargs, forward

    monkeypatch.setattr(Pruned, "_begin", begin)


@pytest.mark.parametrize("name", ["fopru", "plphp"])
def test_generated_positions_off_by_one_are_exposed(name, monkeypatch):
    behind_by_one(monkeypatch)
    found = proof("llava", build((name, METHODS[name])))
    assert not found.holds
    assert found.steps[0].difference < found.tolerance < 0.01 * found.difference


def test_a_method_that_secretly_changes_values_is_exposed():
    class Secret(FoPru):
        only_drops = True

        def merge(self, tokens, keep):
            return tokens.features * 1.01

    Secret.reads = FoPru().reads | {"features"}
    found = proof("llava", [Secret(keep=0.5)])
    assert not found.holds and found.difference > 10 * found.tolerance


def test_numbers_that_are_none_are_no_proof(monkeypatch):
    right = proving.generate

    def poisoned(model, inputs, steps, replay=None):
        sequences, logits, chosen = right(model, inputs, steps, replay)
        if replay is None:
            logits[0, 1, 3] = torch.nan
        return sequences, logits, chosen

    monkeypatch.setattr(proving, "generate", poisoned)
    assert not proof("llava", [FoPru(keep=0.5)]).holds


# -- the command ----------------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(app, ["check", *map(str, args)])


def test_the_command_prints_the_steps_and_a_verdict(tmp_path):
    out = tmp_path / "proof"
    result = run(PICTURE, QUESTION, "-m", "plphp", "--keep", "0.4", "--steps", "4", "--out", out)
    assert result.exit_code == 0, result.output
    assert "without masking" in result.stdout and "'bottom'" in result.stdout
    assert "plphp keep 0.4: equal" in result.stdout and "all tokens agree" in result.stdout
    assert str(out) in result.stderr.replace("\n", "")
    rows = json.loads((out / "rows.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["difference"] <= row["limit"] < 1e-2 for row in rows)
    assert max(row["without_masking"] for row in rows) > 0.1
    assert json.loads((out / "run.json").read_text())["settings"]["dtype"] == "float32"
    assert Image.open(out / "difference.png").width > 1000


def test_several_methods_and_methods_together_have_a_verdict_each(tmp_path):
    result = run(
        PICTURE, QUESTION, "-m", "fopru", "-m", "fopru+plphp", "--keep", "0.5", "--steps", "3", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count(": equal.") == 2
    assert "fopru keep 0.5 + plphp keep 0.5: equal" in result.stdout
    assert "without masking" not in result.stdout


def test_the_command_proves_a_method_with_a_guide(tmp_path):
    result = run(PICTURE, QUESTION, "-m", "sgl", "-m", "sgl+plphp", "--keep", "0.4", "--steps", "4", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "sgl keep 0.4: equal" in result.stdout and "sgl keep 0.4 + plphp keep 0.4: equal" in result.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["difference"] <= row["limit"] < 1e-2 < 0.1 < row["without_masking"] for row in rows)
    assert {row["kept"] for row in rows if row["method"] == "sgl keep 0.4"} == {57}


def test_the_command_fails_where_the_proof_does(tmp_path, monkeypatch):
    behind_by_one(monkeypatch)
    result = run(PICTURE, QUESTION, "-m", "plphp", "--steps", "4", "--out", tmp_path)
    assert result.exit_code == 1
    assert "NOT EQUAL" in result.stdout and "above the" in result.stdout


def test_finished_methods_are_not_proven_again(tmp_path, monkeypatch):
    words = (PICTURE, QUESTION, "-m", "fopru", "--steps", "2", "--out", tmp_path)
    first = run(*words)
    monkeypatch.setattr("foveate.evaluation.check.prove", None)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "2 rows kept, measured on " in again.stderr and f"nothing new in {tmp_path}" in again.stderr
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    other = run(*words[:-1], tmp_path, "--dtype", "bfloat16")
    assert other.exit_code == 2 and "dtype" in other.stderr


@pytest.mark.parametrize("command", ["check", "show"])
def test_rows_of_a_changed_picture_or_model_are_not_shown_again(command, tmp_path):
    model, guide = tmp_path / "model", tmp_path / "guide"
    shutil.copytree(glimpse.PATH, model)
    shutil.copytree(glimpse.SMALL_PATH, guide)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(glimpse.PATH / name, guide)
    picture, out = tmp_path / "a.png", tmp_path / "out"
    Image.open(PICTURE).save(picture)
    steps = ("--steps", "2") if command == "check" else ()
    words = (command, picture, QUESTION, "-m", "sgl", "--model", model, "--guide", guide, *steps, "--out", out)

    def run():
        return CliRunner().invoke(app, [*map(str, words)])

    assert run().exit_code == 0, run().output
    assert run().exit_code == 0
    before = (out / "rows.json").read_text()
    Image.open(PICTURE).save(picture, optimize=True)  # another file, the same picture
    assert run().exit_code == 0
    for change, name in (
        (lambda: Image.open(PICTURE).rotate(180).save(picture), "pictures"),
        (lambda: Image.open(PICTURE).save(picture), None),
        (lambda: os.utime(guide / "model.safetensors"), "guide_files"),
        (lambda: os.utime(model / "model.safetensors"), "model_files"),
    ):
        change()
        result = run()
        assert result.exit_code == (2 if name else 0)
        assert name is None or f"holds rows with {name} " in result.stderr
    assert (out / "rows.json").read_text() == before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([PICTURE], "foveate check"),
        (["nowhere.png", QUESTION], "no such picture"),
        ([PICTURE, QUESTION, "-m", "magic"], "unknown method"),
        ([PICTURE, QUESTION, "-m", "fopru+"], "write names"),
        ([PICTURE, QUESTION, "-m", "trimmed_llama"], "which llava models lack"),
        ([PICTURE, QUESTION, "-m", "fopru+random"], "both act"),
        ([PICTURE, QUESTION, "-m", "visionzip"], "does more than drop"),
        ([PICTURE, QUESTION, "-m", "sgl", "-o", "exit_threshold=0.9"], "leave it out"),
        ([PICTURE, QUESTION, "-m", "sgl", "--guide", "./nowhere"], "(--guide takes"),
        ([PICTURE, QUESTION, "-m", "plphp", "--guide", "./nowhere"], "none of the methods takes a guide"),
        ([PICTURE, QUESTION, "-m", "fastv", "-o", "layer=99"], "layer must be in"),
        ([PICTURE, QUESTION, "--steps", "0"], "steps"),
        ([PICTURE, QUESTION, "--keep", "2.0"], "(0, 1]"),
        ([PICTURE, QUESTION, "--dtype", "int3"], "--dtype int3 is unknown"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(args, expected, tmp_path):
    result = run(*args, "--out", tmp_path / "new")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: ") and expected in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ["gemma4", "llava_windows"])
@pytest.mark.parametrize("name", ["fopru", "fastv", "plphp"])
def test_layers_that_see_a_window_are_proven(family, name):
    found = proof(family, build((name, METHODS[name])), batch="ragged")
    assert found.holds and found.same_tokens and not found.blind and not found.faults


HYBRID = {
    "before": [("fopru", dict(keep=0.25))],
    "inside": [("pyramiddrop", dict(keep=0.25))],
    "cache": [("plphp", dict(keep=0.5, start_layer=1))],
    "all": [("fopru", dict(keep=0.5)), ("fastv", dict(keep=0.5, layer=2)), ("plphp", dict(keep=0.5, start_layer=2))],
    "steps": [("fopru", dict(keep=0.5)), ("last_step", dict(keep=0.5))],
}


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl", "minicpmv4_6"])
@pytest.mark.parametrize("methods", HYBRID)
def test_what_a_state_never_read_is_proven(family, methods):
    found = proof(family, build(*HYBRID[methods]), batch="ragged", steps=4)
    assert found.holds and found.same_tokens and not found.blind and not found.faults


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl"])
@pytest.mark.parametrize("methods", ["before", "all"])
@pytest.mark.parametrize("what", ["seen", "kept"])
def test_a_report_of_other_tokens_shows_in_decoders_with_states(family, methods, what, monkeypatch):
    """Neighbours of what was kept, in every layer."""
    true = proving.short_logits

    def shifted(model, report, *args):
        named = [replace(layer, **{what: getattr(layer, what).roll(1, -1)}) for layer in report.layers]
        monkeypatch.setattr(report, "layers", named)
        return true(model, report, *args)

    monkeypatch.setattr(proving, "short_logits", shifted)
    assert not proof(family, build(*HYBRID[methods]), steps=4).holds


def test_a_layer_without_attention_is_nothing_to_look_at():
    assert sorted(last_token_attention(tiny.build("qwen3_5"), tiny.inputs("qwen3_5"))) == [1, 3, 5]
