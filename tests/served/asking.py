"""Ask the same of vLLM's engine and of transformers: greedy tokens and their log-probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

STEPS = 10


def picture(seed: int, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """Squares of random colours. size: (width, height)."""
    squares = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize(size, Image.Resampling.NEAREST)


@dataclass
class Question:
    """A prompt with its pictures. keep: what the request asks for, None for the server's own."""

    prompt: str
    pictures: Sequence[Image.Image]
    keep: float | int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        asked = {} if self.keep is None else {"mm_processor_kwargs": {"foveate": {"keep": self.keep}}}
        return {"prompt": self.prompt, "multi_modal_data": {"image": list(self.pictures)}, **asked, **self.more}


class Answer(NamedTuple):
    """prompt: its length, -1 where nobody says. ids, logprobs: of the tokens that follow."""

    prompt: int
    ids: list[int]
    logprobs: list[float]


def distance(ones: Sequence[Answer], others: Sequence[Answer]) -> float:
    """The largest difference of log-probabilities, infinite where tokens differ."""
    return max(
        max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        if one.ids == other.ids
        else float("inf")
        for one, other in zip(ones, others, strict=True)
    )


@contextlib.contextmanager
def engine(path: Any, foveate: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    overrides = {} if foveate is None else {"hf_overrides": {"foveate": foveate}}
    defaults = dict(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=4, seed=0)
    llm = LLM(model=str(path), **{**defaults, "limit_mm_per_prompt": {"image": 3, "video": 0}, **overrides, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def served(llm: Any, questions: Sequence[Question], steps: int = STEPS) -> list[Answer]:
    """What vLLM answers, all questions in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=0)
    outputs = llm.generate([question.request() for question in questions], params, use_tqdm=False)
    return [
        Answer(
            len(out.prompt_token_ids),
            list(out.outputs[0].token_ids),
            [next(iter(step.values())).logprob for step in out.outputs[0].logprobs],
        )
        for out in outputs
    ]


class Transformers:
    """A checkpoint in transformers, with and without foveate."""

    def __init__(self, path: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)

    def answers(self, questions: Sequence[Question], method: str | None = None, **options: Any) -> list[Answer]:
        """One question at a time; a question's own `keep` goes before that of the options."""
        import foveate

        found = []
        for question in questions:
            if method is None:
                found.append(self._answer(question))
                continue
            own = options if question.keep is None else {**options, "keep": question.keep}
            with foveate.prune(self.model, method, **own) as pruned:
                answer = self._answer(question)
                dropped = sum(tokens - kept for tokens, kept in pruned.report.images[0])
            found.append(answer._replace(prompt=answer.prompt - dropped))
        return found

    @torch.no_grad()
    def _answer(self, question: Question) -> Answer:
        inputs = self.processor(text=[question.prompt], images=list(question.pictures), return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        ids = out.sequences[0, length:].tolist()
        return Answer(length, ids, [s[0].log_softmax(-1)[t].item() for s, t in zip(out.scores, ids, strict=True)])
