"""What a method before the LLM may read beside attention: encoder layers, tokens of its own, and the question."""

from __future__ import annotations

from dataclasses import dataclass

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import foveate
from foveate.methods.base import EncoderMethod
from foveate.methods.budgets import topk_mask
from foveate.methods.tokens import EncoderTokens

SEEDS = torch.linspace(-1, 1, 3 * 32).view(3, 32)


@dataclass
class Reader(EncoderMethod):
    """Keeps the first tokens, and everything it was shown."""

    summary, source, name = "a test", "a test", "reader"
    reads = frozenset({"levels", "question", "states"})
    keep: float | int = 0.5

    def __post_init__(self):
        super().__post_init__()
        self.seen: list[EncoderTokens] = []

    def levels(self, depth):
        return 1, depth

    @property
    def seeds(self):
        return SEEDS

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        self.seen.append(tokens)
        rank = -torch.arange(tokens.grid[0] * tokens.grid[1], dtype=torch.float32, device=tokens.device)
        return topk_mask(rank.expand(tokens.tiles, -1), budget)


class AlongReader(Reader):
    reads = frozenset({"readers"})


def shown(model, batch: dict, cls=Reader, **kwargs) -> list[EncoderTokens]:
    method = cls()
    with foveate.prune(model, method):
        oracle.run(model, batch, max_new_tokens=2, **kwargs)
    return method.seen


def alone(model, ids: Tensor) -> Tensor:
    """What the untouched LLM makes of text: the last hidden state at its end."""
    with torch.no_grad():
        return model.model.language_model(input_ids=ids[None]).last_hidden_state[0, -1]


def question_of(batch: dict, row: int) -> Tensor:
    ids, mask = batch["input_ids"][row], batch["attention_mask"][row].bool()
    return ids[mask & (ids != tiny.IMAGE)]


@torch.no_grad()
def test_levels_are_the_encoder_s_own_states():
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(2,))
    (tokens,) = shown(model, batch)
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.equal(tokens.levels[:, :, 0], states[1][:, 1:])
    assert torch.equal(tokens.levels[:, :, 1], states[-2][:, 1:])
    assert torch.equal(tokens.states, states[-2][:, 1:])


@torch.no_grad()
def test_levels_of_tiles_and_of_merged_patches():
    batch = tiny.inputs("llava_next", images=(1,))
    model = tiny.build("llava_next")
    for tokens in shown(model, batch):
        assert torch.equal(tokens.levels[:, :, 1], tokens.states)
    model, batch = tiny.build("qwen2_5_vl"), tiny.inputs("qwen2_5_vl", images=(1,))
    seen = []
    handle = model.model.visual.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    (tokens,) = shown(model, batch)
    handle.remove()
    assert tokens.levels.shape[:3] == (1, 24, 2)
    merged = seen[0].view(-1, 4, 32).mean(1)
    # The order of windows is undone: the same rows, in another order.
    gap = torch.cdist(tokens.levels[0, :, 1], merged).min(1)
    assert gap.values.max() < 1e-4 and sorted(gap.indices.tolist()) == list(range(24))


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "llava_cls", "llava_next"])
@torch.no_grad()
def test_tokens_of_its_own_read_the_patches_and_are_not_seen(family):
    """As one run of the concatenated sequence in which the patches see each other only."""
    model, batch = tiny.build(family), tiny.inputs("llava_next" if family == "llava_next" else "llava", images=(2,))
    pixels = batch["pixel_values"].flatten(0, -4)
    pixels = pixels[pixels.flatten(1).abs().sum(1) > 0]  # padded tiles
    method = AlongReader()
    sizes = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
    with foveate.prune(model, method):
        seen: list[Tensor] = []
        handle = model.model.vision_tower.encoder.layers[-1].register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        model.model.get_image_features(batch["pixel_values"], **sizes)
        handle.remove()

    tower = tiny.build(family, "eager").model.vision_tower
    states = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        states = tower.pre_layrnorm(states)
    both, m = torch.cat([states, SEEDS.expand(len(states), -1, -1)], 1), len(SEEDS)
    mask = torch.zeros(1, 1, both.shape[1], both.shape[1])
    mask[..., :-m, -m:] = -torch.inf
    for layer in tower.encoder.layers[:-1]:
        both = layer(both, mask)
    assert (both[:, :-m] - seen[0]).abs().max() < 1e-5
    own = torch.cat([tokens.readers for tokens in method.seen])
    distance = torch.cdist(own.flatten(1), both[:, -m:].flatten(1))
    assert distance.min(1).values.max() < 1e-4, "every tile has the readers of one of the pictures"
    if family == "llava":
        assert (own - both[:, -m:]).abs().max() < 1e-5


def test_the_patches_stay_as_they_are():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    with torch.no_grad():
        untouched = model.model.get_image_features(batch["pixel_values"]).pooler_output
        with foveate.prune(model, AlongReader()):
            beside = model.model.get_image_features(batch["pixel_values"]).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(untouched, beside, strict=True))


def test_an_encoder_without_room_for_further_tokens_is_refused():
    with pytest.raises(foveate.UnsupportedError, match="reader sends tokens of its own through the vision encoder"):
        foveate.prune(tiny.build("qwen2_5_vl"), AlongReader())


# The question ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.CORE_DECODERS)
@pytest.mark.parametrize("decoding", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_every_image_gets_the_question_of_its_own_prompt(family, decoding):
    model = tiny.build(family)
    batch = tiny.inputs(family, images=(1, 0, 2), text=(5, 9, 7))
    expected = [alone(model, question_of(batch, row)) for row in (0, 2)]
    found = torch.cat([tokens.question for tokens in shown(model, batch, **decoding)])
    gap = torch.cdist(found, torch.stack(expected))
    assert gap.min(1).values.max() < 1e-5
    assert set(gap.argmin(1).tolist()) == {0, 1}
    if family == "llava":
        assert gap.argmin(1).tolist() == [0, 1, 1]


def test_a_plain_forward_reads_the_question_too():
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 2), text=(4, 6))
    method = Reader()
    with foveate.prune(model, method), torch.no_grad():
        model(**batch, logits_to_keep=1)
    expected = torch.stack([alone(model, question_of(batch, row)) for row in (0, 1, 1)])
    assert (method.seen[0].question - expected).abs().max() < 1e-5


def test_an_answer_that_is_scored_is_no_part_of_the_question():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    prompt, method = batch["input_ids"].shape[1], Reader()
    with foveate.prune(model, method) as pruned, torch.no_grad(), pruned.prompt(prompt):
        answer = torch.tensor([[7, 8, 9]])
        longer = {**batch, "input_ids": torch.cat([batch["input_ids"], answer], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        model(**longer)
    assert (method.seen[0].question[0] - alone(model, question_of(batch, 0))).abs().max() < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_labels_say_where_the_question_ends(use_cache):
    """With a gradient, too, for which no caller keeps a cache."""
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 2), text=(4, 6))
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    method = Reader()
    with foveate.prune(model, method):
        scored = model(**batch, labels=labels, use_cache=use_cache).logits
        kept = model(**batch, labels=labels).logits
    prompts = {name: value[:, :-3] for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    expected = torch.stack([alone(model, question_of(prompts, row)) for row in (0, 1, 1)])
    assert (method.seen[0].question - expected).abs().max() < 1e-5
    assert (scored - kept).abs().max() < 1e-5


def test_a_later_turn_s_pictures_get_that_turn_s_question():
    model, batch = tiny.build("llava"), tiny.inputs("llava")
    method = Reader()
    with foveate.prune(model, method):
        first = oracle.run(model, batch, max_new_tokens=3)
        turn = tiny.next_turn(model, batch, first.sequences, True)
        past = first.cache.get_seq_length()
        oracle.run(model, turn | {tiny.CACHE: first.cache}, max_new_tokens=2)
    new = turn["input_ids"][0, past:]
    expected = alone(model, new[new != tiny.IMAGE])
    assert (method.seen[-1].question[0] - expected).abs().max() < 1e-5


def test_without_a_question_nothing_is_chosen():
    model, batch = tiny.build("llava"), tiny.inputs("llava", images=(1, 1), text=(4, 4))
    pictures_only = batch["input_ids"] == tiny.IMAGE
    pictures_only[0] = batch["attention_mask"][0].bool()
    batch["attention_mask"] = pictures_only.long()
    with foveate.prune(model, Reader()):
        with pytest.raises(foveate.UnsupportedError, match="a sample has none beside its picture"):
            model.generate(**batch, max_new_tokens=2)
        with pytest.raises(foveate.UnsupportedError, match="these images are encoded without one"):
            model.model.get_image_features(batch["pixel_values"])
