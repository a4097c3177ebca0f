"""By what methods rank tokens: in the report, where the prompt has these tokens; and what they rank highest stays."""

from __future__ import annotations

import pytest
import tiny
import torch
from cases import FITS, METHODS, pruned_run

import foveate
from foveate.engine.scores import laid_out

# By several numbers, or by some that say little of a single token: rows of a picture; a budget for each half of the
# attention; what is spread evenly besides, or merged; the favourites of every head.
IN_PARTS = ("fopru_row", "apet", "cdpruner", "csp", "sparsevlm", "topv", "trimmed_llama")
BY_NO_NUMBER = ("uniform", "dart")


def ranked(report, name: str, row: int):
    """For each layer that chose, and each image, or tile of it where these have budgets: scores, and what stayed, both
    (heads, n)."""
    tiled = foveate.method_class(name).place == "encoder"
    for layer, scores in report.scores.get(name, {}).items():
        kept = report.layers[layer].kept
        for image in report.image_tokens[row]:
            tiles = [tile.index for tile in image.tiles]  # what lies in none is pinned
            for part in tiles if tiled else [torch.cat(tiles)]:
                each = scores[row][:, image.positions[part]]
                yield each, kept[row][:, image.positions[part]].expand(len(each), -1)


@pytest.mark.parametrize(("family", "name"), FITS)
@pytest.mark.parametrize("batch", list(tiny.BATCHES))
@pytest.mark.sampled(6)
def test_what_ranks_highest_stays(family, name, batch):
    inputs = tiny.inputs(family, **tiny.BATCHES[batch])
    _, report = pruned_run(tiny.build(family, "sdpa"), name, inputs, max_new_tokens=1)
    found = [pair for row in range(len(inputs["input_ids"])) for pair in ranked(report, METHODS[name][0], row)]
    assert bool(found) == (name not in BY_NO_NUMBER)
    for scores, stays in found:
        asked = ~scores.isnan()
        assert not (stays & ~asked).any(), "what was not asked had left before"
        assert asked.any() and not scores[asked].isposinf().any()
        if name in IN_PARTS:
            continue
        lowest = scores.where(stays, torch.inf).amin(-1)
        assert (lowest >= scores.where(asked & ~stays, -torch.inf).amax(-1)).all()


def told(model, method, batch: dict, name: str = "", steps: int = 1):
    """What a method ranked by, layer by layer, and the report."""
    with foveate.prune(model, method, record=True) as pruned:
        model.generate(**batch, max_new_tokens=steps, do_sample=False)
        return pruned.report.scores.get(name or method.name, {}), pruned.report


@pytest.mark.parametrize("name", ["evs", "vidcom2", "dycoke", "random_clip", "uniform_frames", "fastvid", "holitom"])
def test_frames_are_ranked_together(name):
    model = tiny.build("qwen2_5_vl")
    scores, report = told(
        model, foveate.get_method(name, keep=0.5), tiny.videos("qwen2_5_vl", videos=(1, 2), text=(4, 3))
    )
    if name == "uniform_frames":
        assert not scores
        return
    kept = report.layers[0].kept
    for row, images in enumerate(report.image_tokens):
        for image in images:
            each, stays = scores[0][row, 0, image.positions], kept[row, 0, image.positions]
            assert not each.isnan().any() and stays.any() and not stays.all()
            assert each.unique().numel() > len(each) / 4, "numbers that tell tokens apart"
            assert each[stays].mean() > each[~stays].mean() or name in ("fastvid", "holitom")  # which merge the rest
            if name in ("evs", "random_clip"):  # without budgets for frames, or anchors beside what ranks first
                assert each[stays].amin() >= each[~stays].amax()


@pytest.mark.parametrize("name", ["visionzip", "elastic_cache", "zipvl", "pooling"])
def test_what_merges_says_by_what_it_chose(name):
    scores, _ = told(tiny.build("llava"), foveate.get_method(name, keep=0.5), tiny.inputs("llava"))
    assert len(scores) == {"visionzip": 1, "pooling": 0}.get(name, 4)
    assert all(each.nan_to_num(0).unique().numel() > 9 for each in scores.values())


def test_routers_are_told_of_each_layer_they_route():
    scores, report = told(
        tiny.build("llava"), foveate.get_method("videollm_mod", keep=0.25, router="random"), tiny.inputs("llava")
    )
    assert list(scores) == [1, 3]
    (image,) = report.image_tokens[0]
    for layer, each in scores.items():
        went, count = report.layers[layer].kept[0, 0, image.positions], each[0, 0, image.positions]
        assert count[went].amin() >= count[~went].amax()


def test_a_step_is_told_by_what_it_read():
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])
    method = foveate.get_method("last_step", keep=0.25, dense_layers=1, refresh=None)
    scores, report = told(tiny.build("llava"), method, batch, steps=4)
    assert list(scores) == [1, 2, 3]
    for layer, chosen in report.decoding.chosen[-1].items():
        for row, images in enumerate(report.image_tokens):
            for image in images:
                each, read = scores[layer][row][:, image.positions], chosen[row][:, image.positions]
                assert (each.where(read, torch.inf).amin(-1) >= each.where(~read, -torch.inf).amax(-1)).all()


def test_the_second_view_and_the_guide_are_told_of():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    scores, _ = told(model, foveate.get_method("mint", keep=0.25, layer=2), batch)
    assert list(scores) == [2]
    guide = tiny.build("llava", seed=5)
    scores, _ = told(model, foveate.get_method("sgl", keep=0.5, layer=2, guide=guide), batch)
    assert list(scores) == [2]


def test_methods_together_are_told_of_one_by_one():
    with foveate.prune(tiny.build("llava"), ["divprune", "fastv", "csp"], record=True) as pruned:
        pruned.model.generate(**tiny.inputs("llava"), max_new_tokens=1)
        scores = pruned.report.scores
    assert {name: len(of_layers) for name, of_layers in scores.items()} == {"divprune": 1, "fastv": 1, "csp": 4}
    asked = {name: int((~next(iter(of_layers.values())).isnan()[0, 0]).sum()) for name, of_layers in scores.items()}
    assert asked["divprune"] > asked["fastv"] == asked["csp"] > 0, "only what is there yet is ranked"


@pytest.mark.parametrize("name", ["divprune", "dart"])
def test_nothing_is_asked_where_nothing_is_recorded(name, monkeypatch):
    """Of two methods whose own choice does not need it."""
    asked = []
    monkeypatch.setattr(foveate.method_class(name), "score", lambda self, tokens: asked.append(tokens))
    for record in (False, True):
        with foveate.prune(tiny.build("llava"), name, record=record) as pruned:
            pruned.model.generate(**tiny.inputs("llava"), max_new_tokens=1)
            assert pruned.report.scores == {} and len(asked) == record


def test_no_graph_is_kept_alive():
    model = tiny.build("llava").requires_grad_(True)
    for name in ("vtc_cls", "evs", "fastv", "csp"):
        with foveate.prune(model, name, record=True) as pruned:
            model(**tiny.inputs("llava"))
            assert not any(each.requires_grad for each in pruned.report.scores[name].values())


def test_query_heads_of_cross_attention_count_together():
    scores, report = told(tiny.build("mllama"), foveate.get_method("trimmed_llama", keep=0.1), tiny.inputs("mllama"))
    (layer,) = scores
    assert scores[layer].shape[1] == 2 and scores[layer].shape[2] == report.layers[layer].length


def test_an_answer_of_one_token_has_no_step_to_tell_of():
    scores, report = told(tiny.build("llava"), foveate.get_method("pages", keep=0.25), tiny.inputs("llava"), steps=1)
    assert not scores and report.scores == {}


def test_scores_of_another_shape_are_refused(monkeypatch):
    monkeypatch.setattr(foveate.method_class("random"), "score", lambda self, tokens: torch.zeros(1, 2))
    monkeypatch.setattr(
        foveate.method_class("random"), "select", lambda self, tokens, budget: torch.ones(1, 36, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match=r"random scores with torch.float32 of shape \(1, 2\)"):
        told(tiny.build("llava"), foveate.get_method("random", keep=36), tiny.inputs("llava"))


def test_so_are_they_inside_the_model(monkeypatch):
    monkeypatch.setattr(foveate.method_class("fastv"), "score", lambda self, tokens: None)
    monkeypatch.setattr(foveate.method_class("fastv"), "select", lambda self, tokens: tokens.groups.present)
    assert told(tiny.build("llava"), foveate.get_method("fastv"), tiny.inputs("llava"))[0] == {}
    monkeypatch.setattr(foveate.method_class("fastv"), "score", lambda self, tokens: tokens.groups.present)
    with pytest.raises(ValueError, match=r"fastv scores with torch.bool"):
        told(tiny.build("llava"), foveate.get_method("fastv"), tiny.inputs("llava"))


def test_scores_are_laid_out_where_their_tokens_are():
    scores = torch.tensor([[[1.0, 2.0, 9.0]], [[3.0, 4.0, 5.0]]])
    positions = torch.tensor([[4, 1, -1], [0, 2, 3]])
    out = laid_out(scores, positions, torch.tensor([1, 0]), (2, 6))
    nan = float("nan")
    expected = torch.tensor([[[3, nan, 4, 5, nan, nan]], [[nan, 2, nan, nan, 1, nan]]])
    assert out.shape == (2, 1, 6) and torch.equal(out.nan_to_num(-1), expected.nan_to_num(-1))
    halves = scores.unsqueeze(2).expand(2, 1, 2, 3)
    assert laid_out(halves, positions, torch.tensor([1, 0]), (2, 6))[0, 0, 0] == 6
