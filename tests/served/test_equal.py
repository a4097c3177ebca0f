"""What vLLM answers with foveate is what transformers answers with `foveate.prune`, to the log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Answer, Question, Transformers, distance, engine, picture, served
from checkpoints import make

# Sizes (width, height) that each processor treats in different ways: square, wide, high.
SIZES = {
    "llava": [(112, 112), (224, 112), (112, 200)],
    "llava_next": [(112, 112), (224, 112), (112, 200)],
    "qwen2_vl": [(168, 168), (224, 112), (112, 252)],
    "qwen2_5_vl": [(168, 168), (224, 112), (112, 252)],
    "qwen3_vl": [(192, 192), (256, 128), (128, 288)],
    "internvl": [(112, 112), (224, 112), (200, 210)],
    "idefics3": [(112, 112), (224, 112), (112, 200)],
    "smolvlm": [(112, 112), (224, 112), (112, 200)],
    "llava_onevision": [(56, 56), (112, 56), (224, 200)],
    "mistral3": [(112, 112), (168, 84), (56, 168)],
}
PICTURE = {
    "llava": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "mistral3": "[IMG]",
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>",
}
# One that reads attention, one that merges or compares features.
METHODS = {
    "llava": ["fopru", "visionzip", "vtc_cls", "divprune", "pooling", "uniform", "random"],
    "llava_next": ["fopru", "visionzip"],
    "qwen2_vl": ["fopru", "pooling"],
    "qwen2_5_vl": ["fopru", "visionzip"],
    "qwen3_vl": ["fopru", "divprune"],
    "internvl": ["fopru", "visionzip"],
    "idefics3": ["fopru", "visionzip"],
    "smolvlm": ["fopru", "divprune"],
    "llava_onevision": ["fopru", "visionzip"],
    "mistral3": ["fopru", "visionzip"],
}
TOLERANCE = 1e-4
RANGE = {"lowest": 0.05, "highest": 1.0}
KEEPS = (0.5, None, 0.3, 0.25)


def questions(family: str, keeps: tuple[float | None, ...] = (None,) * 4) -> list[Question]:
    """Three pictures of different sizes, and two behind a long text."""
    here = next(text for start, text in PICTURE.items() if family.startswith(start))
    sizes, one = SIZES[family], f"USER: {here}what is this? ASSISTANT:"
    asked = [(one, [picture(number, size)]) for number, size in enumerate(sizes)]
    long = f"USER: hello there, this is a long text before the first one {here}and {here}compare. ASSISTANT:"
    asked.append((long, [picture(3, sizes[1]), picture(4, sizes[0])]))
    return [Question(prompt, pictures, keep) for (prompt, pictures), keep in zip(asked, keeps, strict=True)]


class Family:
    """A family's checkpoint, its model in transformers, and what stock vLLM answers."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path = name, make(name, folder / name)
        self.transformers = Transformers(self.path)
        with engine(self.path) as llm:
            self.stock = served(llm, questions(name))

    def expected(self, method: str, keeps: tuple[float | None, ...] = (None,) * 4, keep: float = 0.25) -> list[Answer]:
        return self.transformers.answers(questions(self.name, keeps), method, keep=keep)


CORE = ("llava", "qwen2_5_vl")
ROWS = [pytest.param(name, marks=[] if name in CORE else pytest.mark.slow) for name in SIZES]


@pytest.fixture(scope="module", params=ROWS)
def family(request: pytest.FixtureRequest, folder: Path) -> Family:
    return Family(request.param, folder)


def check_equal(found: list[Answer], expected: list[Answer]) -> None:
    assert [answer.prompt for answer in found] == [answer.prompt for answer in expected]
    for one, other in zip(found, expected, strict=True):
        assert distance([one], [other]) < TOLERANCE


def test_stock_vllm_answers_as_transformers(family: Family) -> None:
    """Otherwise nothing below would say anything."""
    check_equal(family.stock, family.transformers.answers(questions(family.name)))


def test_equal_to_transformers(family: Family) -> None:
    """The server's keep, mixed keeps in one batch, everything kept; and the first again, from the caches."""
    for method in METHODS[family.name]:
        with engine(family.path, {"method": method, "keep": 0.25, **RANGE}) as llm:
            expected = family.expected(method)
            check_equal(served(llm, questions(family.name)), expected)
            if method == METHODS[family.name][0]:
                assert distance(expected, family.stock) > 100 * TOLERANCE  # pruning is seen
                check_equal(served(llm, questions(family.name, KEEPS)), family.expected(method, KEEPS))
                check_equal(served(llm, questions(family.name, (1.0,) * 4)), family.stock)
                check_equal(served(llm, questions(family.name)), expected)


def test_chunks_that_cut_pictures(family: Family) -> None:
    """Twenty-four tokens a step, and a second round that finds the prompts in the prefix cache."""
    method = METHODS[family.name][0]
    options = dict(max_num_batched_tokens=24, max_num_seqs=2)
    with engine(family.path, {"method": method, "keep": 0.5}, **options) as llm:
        for _ in range(2):
            check_equal(served(llm, questions(family.name)), family.expected(method, keep=0.5))


# -- LLaVA alone, for what does not depend on the model


@pytest.fixture(scope="module")
def llava(folder: Path) -> Family:
    return Family("llava", folder)


def test_preempted_requests_come_again(llava: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen blocks of the cache hold the four prompts, and not what three of them go on to."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    options = dict(block_size=32, num_gpu_blocks_override=14, max_model_len=256)
    with engine(llava.path, {"method": "fopru", "keep": 0.5}, **options) as llm:
        check_equal(served(llm, questions("llava")), llava.expected("fopru", keep=0.5))
    assert preempted


@pytest.fixture(scope="module")
def pruned(llava: Family) -> Iterator[Any]:
    with engine(
        llava.path, {"method": "fopru", "keep": 0.25, **RANGE}, limit_mm_per_prompt={"image": 40, "video": 0}
    ) as llm:
        yield llm


def many(count: int) -> list[Question]:
    prompt = "USER: " + "<image>\n" * count + "what are they? ASSISTANT:"
    return [Question(prompt, [picture(i) for i in range(count)], 0.05)]


@pytest.mark.parametrize(
    ("keep", "says"), [(0.0, "keep must be"), ("x", "keep must be"), (0.01, "outside"), (1, "outside")]
)
def test_refused_requests(pruned: Any, keep: Any, says: str) -> None:
    question = questions("llava")[0]
    with pytest.raises(ValueError, match=says):
        served(pruned, [Question(question.prompt, question.pictures, keep)])


def test_positions_behind_the_model_s_last(pruned: Any, llava: Family) -> None:
    """The unpruned prompt may be as long as the model, and generation go beyond; a longer one leaves no trace."""
    expected = llava.transformers.answers(many(31), "fopru", keep=0.05)
    assert 2048 - 10 < len(many(31)[0].prompt) + 31 * (64 - len("<image>")) <= 2048
    check_equal(served(pruned, many(31)), expected)
    for _ in range(2):
        with pytest.raises(ValueError, match="positions"):
            served(pruned, many(40))
    question = Question(questions("llava")[0].prompt, [picture(39)], 0.05)  # was among the refused
    check_equal(served(pruned, [question]), llava.transformers.answers([question], "fopru", keep=0.05))


def test_wrong_hashes_are_seen(pruned: Any, llava: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without keep among what identifies a picture, the second request would get the first one's."""
    from foveate.vllm.processor import PrunedProcessor

    question = questions("llava")[0]
    pair = [Question(question.prompt, [picture(70)], keep) for keep in (0.5, 0.25)]
    expected = llava.transformers.answers(pair, "fopru")
    right = [served(pruned, [one])[0] for one in pair]
    check_equal(right, expected)
    monkeypatch.delattr(PrunedProcessor, "_get_mm_hashes")
    wrong = [served(pruned, [Question(question.prompt, [picture(71)], one.keep)])[0] for one in pair]
    assert wrong[0].prompt == wrong[1].prompt


def test_a_wrong_encoder_layer_is_seen(llava: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    from foveate.families.llava import Llava

    expected = llava.expected("fopru")
    monkeypatch.setattr(Llava, "readable", lambda self, config, depth: [0])
    with engine(llava.path, {"method": "fopru", "keep": 0.25}) as llm:
        assert distance(served(llm, questions("llava")), expected) > 100 * TOLERANCE


def test_compact_positions_are_others(llava: Family) -> None:
    """Control for the original ones; and more pictures than the model has positions."""
    foveate = {"method": "fopru", "keep": 0.25, "positions": "compact", **RANGE}
    with engine(llava.path, foveate, limit_mm_per_prompt={"image": 40, "video": 0}) as llm:
        found = served(llm, questions("llava"))
        expected = llava.expected("fopru")
        assert [answer.prompt for answer in found] == [answer.prompt for answer in expected]
        assert distance(found, expected) > 100 * TOLERANCE
        assert served(llm, many(40))[0].prompt < 300


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "plphp", "keep": 0.25}, "transformers"),
        ({"method": "fopru", "keep": 2.0}, "keep must be"),
        ({"method": "fopru", "keep": 0.25, "lowest": 0.5}, "lowest"),
    ],
)
def test_refused_at_start(llava: Family, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says), engine(llava.path, options):
        pass


def test_other_models_are_refused(folder: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder / "llama")
    with (
        pytest.raises(ValueError, match="foveate serves"),
        engine(folder / "llama", {"method": "fopru", "keep": 0.25}, skip_tokenizer_init=True),
    ):
        pass


def test_more_pictures_are_profiled_where_less_may_stay(pruned: Any, llava: Family) -> None:
    """The encoder of a step may get as many pictures as its budget holds at the lowest keep."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    budget = MultiModalBudget(pruned.llm_engine.vllm_config, MULTIMODAL_REGISTRY)
    assert budget.mm_max_toks_per_item["image"] == 64
    assert budget.processor.fewest_embeddings("image") == 3
    room = budget.get_encoder_budget() // 3
    assert budget.mm_max_items_per_batch["image"] == min(room, budget.max_num_reqs * 40)
