"""`quecc` against plain modules of torch in front of the untouched LLM, which gets the tokens that they make.

The reference runs each sample alone, without padding and without the places where nothing stands: it shares no code
with foveate.
"""

from __future__ import annotations

import math
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from cases import TOLERANCE
from plain_quecc import PlainQueCC
from test_maths_encoder import slow_bands, slow_cells
from torch import Tensor

import foveate
from foveate.engine.target import fingerprint
from foveate.methods.quecc import QueCC
from foveate.methods.tokens import EncoderTokens
from foveate.methods.trained import write_plugin

FAR = 1e-2  # what a mistake costs at least
SIDE = 6
backends = pytest.mark.parametrize("attn", ["eager", "sdpa"])
decodings = pytest.mark.parametrize("decoding", [oracle.GREEDY, oracle.BEAMS], ids=["greedy", "beams"])
batches = pytest.mark.parametrize("batch", tiny.BATCHES)


def plain(family: str, keep: int) -> PlainQueCC:
    width, hidden = tiny.VISION["hidden_size"], tiny.LLM["hidden_size"]
    side = SIDE // math.isqrt(keep)
    # Where patches are joined, the states are the LLM's; its encoder has more layers.
    states, read = (hidden, 3 * width) if family == "qwen2_5_vl" else (width, 2 * width)
    return PlainQueCC(states, read, hidden, 4, (side, side), seed=keep)


def written(folder: Path, family: str, keep: int, question: str = "own") -> QueCC:
    """The method with the weights of `plain`, trained for this very model as far as it can know."""
    path, model = folder / f"{family}-{keep}-{question}.safetensors", tiny.build(family)
    weights = plain(family, keep).weights()
    write_plugin(path, QueCC(keep=keep, question=question), "llava", fingerprint(model.model), weights)
    return QueCC(keep=keep, question=question, weights=path)


@torch.no_grad()
def made(model, pixels: Tensor, text: Tensor, keep: int, question: str) -> Tensor:
    """(keep, hidden) the tokens of one picture beside one text, which the untouched model reads alone."""
    prefix = 0 if "siglip" in model.config.vision_config.model_type else 1
    states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
    depth = model.config.vision_config.num_hidden_layers - 1  # the features are those of the layer before the last
    asked = model.model.language_model(input_ids=text[None]).last_hidden_state[0, -1] if question == "own" else None
    levels = torch.cat([states[depth - 1], states[depth]], -1)[0, prefix:]
    return plain("llava", keep)(states[depth][0, prefix:], levels, asked, (SIDE, SIDE))


@torch.no_grad()
def reference(model, batch: dict, keep: int, question: str, sequences: Tensor, rows: Tensor) -> Tensor:
    """Logits of every step of `sequences`, on the text and the tokens that were made, each at its place."""
    embed, prompt = model.get_input_embeddings(), batch["input_ids"].shape[1]
    cell = SIDE // math.isqrt(keep)
    middles = torch.arange((cell - 1) // 2, SIDE, cell)
    centres = (middles[:, None] * SIDE + middles).flatten()
    pinned = int(
        model.config.vision_feature_select_strategy == "full" and model.config.vision_config.model_type[0] == "c"
    )
    pixels, prompts = list(batch.get("pixel_values", ())), []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        ids = ids[mask]
        is_image, embeds, stays = ids == tiny.IMAGE, embed(ids), torch.ones(len(ids), dtype=torch.bool)
        places = is_image.nonzero().flatten().view(-1, pinned + SIDE**2)
        for place in places:
            picture = pixels.pop(0)
            at = place[pinned:][centres]
            stays[place[pinned:]] = False
            stays[at] = True
            if pinned:
                embeds[place[:1]] = model.model.get_image_features(picture[None]).pooler_output[0][:1]
            embeds[at] = made(model, picture, ids[~is_image], keep, question)
        prompts.append((embeds[stays], stays.nonzero().flatten()))
    assert not pixels
    logits = []
    for sequence, row in zip(sequences, rows.tolist(), strict=True):
        embeds, places = prompts[row]
        told = sequence[prompt:-1]
        later = places[-1] + 1 + torch.arange(len(told))
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([embeds, embed(told)])[None], position_ids=torch.cat([places, later])[None]
        ).last_hidden_state
        logits.append(model.lm_head(hidden[0, len(embeds) - 1 :]))
    return torch.stack(logits)


class Watched(QueCC):
    """Notes what it is shown, which tokens stay, and what they become."""

    @classmethod
    def shown(cls, model, method: QueCC, batch: dict) -> list[tuple[EncoderTokens, Tensor, Tensor]]:
        watched = cls(keep=method.keep, question=method.question, weights=method.weights)
        watched.seen = []
        with foveate.prune(model, watched), torch.no_grad():
            model(**batch, logits_to_keep=1)
        return watched.seen

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor:
        becomes = super().merge(tokens, keep)
        self.seen.append((tokens, keep, becomes))
        return becomes


def check(method: QueCC, family: str, batch: dict, attn: str, decoding: dict) -> tuple[oracle.Run, float]:
    """Compare a run with the one by hand; return it and the largest difference."""
    with foveate.prune(tiny.build(family, attn), method, record=True) as pruned:
        run, report = oracle.run(pruned.model, batch, **decoding), pruned.report
    rows = run.rows // (len(report.layers[0].kept) // len(batch["input_ids"]))  # the prefill runs a row for each beam
    dense = reference(tiny.build(family), batch, method.keep, method.question, run.sequences, rows)
    worst = (dense - run.logits).abs().max()
    assert worst < TOLERANCE
    return run, float(worst)


@batches
@backends
@decodings
@pytest.mark.parametrize("keep", [4, 9])
def test_logits_equal_those_of_an_llm_that_gets_the_tokens_of_plain_modules(tmp_path, batch, attn, decoding, keep):
    check(written(tmp_path, "llava", keep), "llava", tiny.inputs("llava", **tiny.BATCHES[batch]), attn, decoding)


@pytest.mark.parametrize("keep", [1, 36])
def test_one_token_and_as_many_as_patches(tmp_path, keep):
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])
    check(written(tmp_path, "llava", keep), "llava", batch, "sdpa", oracle.GREEDY)


def test_without_the_question(tmp_path):
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])
    check(written(tmp_path, "llava", 4, "none"), "llava", batch, "sdpa", oracle.GREEDY)


@pytest.mark.parametrize("family", ["llava_siglip", "llava_mistral"])
def test_other_encoders_and_decoders(tmp_path, family):
    batch = tiny.inputs("llava", **tiny.BATCHES["ragged"])
    check(written(tmp_path, family, 4), family, batch, "sdpa", oracle.GREEDY)


def test_a_mistake_would_be_seen(tmp_path):
    """The reference without the question, and with other weights, is far off."""
    batch, method = tiny.inputs("llava"), written(tmp_path, "llava", 4)
    run, _ = check(method, "llava", batch, "sdpa", oracle.GREEDY)
    model = tiny.build("llava")
    unasked = reference(model, batch, 4, "none", run.sequences, run.rows)
    assert (unasked - run.logits).abs().max() > FAR
    with foveate.prune(model, "pooling", keep=4):
        pooled = oracle.run(model, batch, **oracle.GREEDY)
    assert (pooled.logits[:, 0] - run.logits[:, 0]).abs().max() > FAR


def test_the_same_question_alone_and_in_a_padded_batch(tmp_path):
    model, method = tiny.build("llava"), written(tmp_path, "llava", 4)
    batch = tiny.inputs("llava", images=(1, 2, 1), text=(4, 9, 2))
    with foveate.prune(model, method), torch.no_grad():
        together = model(**batch, logits_to_keep=1).logits[:, -1]
        pictures = batch["pixel_values"].split([1, 2, 1])
        for row, pixels in enumerate(pictures):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
            alone = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]
            assert (alone - together[row]).abs().max() < TOLERANCE


def test_another_question_makes_other_tokens(tmp_path):
    model, method = tiny.build("llava"), written(tmp_path, "llava", 4)
    batch = tiny.inputs("llava")
    asked_another = {**batch, "input_ids": batch["input_ids"].clone()}
    asked_another["input_ids"][0, -1] = (batch["input_ids"][0, -1] + 1) % tiny.TEXT
    own, other = (Watched.shown(model, method, each)[0] for each in (batch, asked_another))
    assert (own[2] - other[2])[own[1]].abs().max() > FAR


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_every_tile_is_cut_with_its_share(tmp_path, family):
    """Cells of sizes that no training saw, against a walk through the patches of each."""
    model, batch = tiny.build(family), tiny.inputs(family, images=(1, 2, 1), text=(4, 9, 2))
    method = written(tmp_path, family, 9)
    modules, seen = plain(family, 9), Watched.shown(model, method, batch)
    assert len(seen) > 1, "grids of several shapes"
    for tokens, keep, becomes in seen:
        for tile in range(tokens.tiles):
            budget = int(keep[tile].sum())
            cells = slow_cells(slow_bands(budget, tokens.grid), budget, tokens.grid)
            question, levels = tokens.question[tile], tokens.levels[tile].flatten(1)
            expected = modules.by_cell(tokens.states[tile], levels, question, cells, tokens.grid)
            assert keep[tile].nonzero().flatten().tolist() == sorted(expected)
            for patch, token in expected.items():
                assert (becomes[tile, patch] - token).abs().max() < TOLERANCE


def test_a_later_turn_brings_its_own_picture_and_question(tmp_path):
    """The picture of the second turn is read with the text of that turn alone; the first one's tokens stay."""
    model, method = tiny.build("llava"), written(tmp_path, "llava", 4)
    batch = tiny.inputs("llava")
    with foveate.prune(model, method, record=True):
        first = oracle.run(model, batch, max_new_tokens=4)
        turn = tiny.next_turn(model, batch, first.sequences, True)
        second = oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=6)
    old, ids = batch["input_ids"].shape[1], turn["input_ids"][0]
    past = first.sequences.shape[1]
    clean = tiny.build("llava")
    embeds, stays = clean.get_input_embeddings()(ids)[:], torch.ones(len(ids), dtype=torch.bool)
    centres = torch.tensor([7, 10, 25, 28])
    for begin, end, pixels in ((0, old, batch["pixel_values"]), (past - 1, len(ids), turn["pixel_values"])):
        span = ids[begin:end]
        place = begin + (span == tiny.IMAGE).nonzero().flatten()
        stays[place] = False
        stays[place[centres]] = True
        embeds[place[centres]] = made(clean, pixels[0], span[span != tiny.IMAGE], 4, "own")
    told = second.sequences[0, len(ids) : -1]
    with torch.no_grad():
        hidden = clean.model.language_model(
            inputs_embeds=torch.cat([embeds[stays], clean.get_input_embeddings()(told)])[None],
            position_ids=torch.cat([stays.nonzero().flatten(), len(ids) + torch.arange(len(told))])[None],
        ).last_hidden_state[0, -len(told) - 1 :]
    assert (clean.lm_head(hidden) - second.logits[0]).abs().max() < TOLERANCE


def test_a_sample_without_a_question_is_refused(tmp_path):
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 1), text=(4, 4))
    batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] == tiny.IMAGE)
    with (
        foveate.prune(model, written(tmp_path, "llava", 4)),
        pytest.raises(foveate.UnsupportedError, match="quecc chooses by the question, and a sample has none"),
    ):
        model.generate(**batch, max_new_tokens=2)
