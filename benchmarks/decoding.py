"""How much of the attention that an answer pays to its picture each method foresees, at the same number of tokens read.

python benchmarks/decoding.py

glimpse gives its own right answers by rote; every layer's rows of attention are what is to be foreseen. Methods choose
for each token of the answer as in decoding, know only what they would have read, and count where they choose: not in
the first two layers, not where a step reads everything. Nothing they leave out changes what comes later, so that all
see the same rows. "seen before" chooses by the row itself: no method can do better. Runs offline on two CPU cores in a
few minutes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import foveate
from foveate import glimpse
from foveate.engine.support import find_target
from foveate.evaluation.questions import from_glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import model_inputs
from foveate.evaluation.tables import markdown
from foveate.methods.base import DecodeMethod
from foveate.methods.stepwise import Memory
from foveate.methods.tokens import LayerTokens

KINDS = ("describe", "list", "line", "each")  # answers of several words, which go back to the picture
KEEPS = (0.5, 0.25, 0.1)
BEST = "seen before"
CANDIDATES: dict[str, dict[str, Any]] = {
    "attention_predictor": {},
    "last_step": {},
    "running_sum": {},
    "pages": {},
    "pages:page=4": {"page": 4},
    "per_turn": {"dense_layers": 2},
    BEST: {},
}


class Watching(DecodeMethod):
    """Keeps what every layer computed: for the prompt, then for the answer."""

    name = "watching"

    def __init__(self) -> None:
        super().__init__(keep=0.5, refresh=None, dense_layers=2)
        self.seen: list[tuple[LayerTokens, LayerTokens]] = []
        self._prompts: dict[int, LayerTokens] = {}

    def observe(self, tokens: LayerTokens, memory: Memory) -> Memory:
        if tokens.layer in self._prompts:
            self.seen.append((self._prompts.pop(tokens.layer), tokens))
        else:
            self._prompts[tokens.layer] = tokens
        return {"none": tokens.slots}

    def score(self, memory: Memory, query: Tensor, scaling: float) -> Tensor:
        raise NotImplementedError("no step runs here")  # only prompts are read, whose rows are compared afterwards


def rows_of(answer: LayerTokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Query (groups, heads, d) and attention on the images (groups, heads, n) of each token of the answer in turn."""
    attention = answer.of_images(answer.attention(answer.text)).clamp(min=0)
    for step, row in enumerate(answer.text.clamp(min=0).unbind(1)):
        query = answer.query[torch.arange(len(row)), :, row]
        yield query[answer.groups.row], attention[:, :, step]


def recall(method: DecodeMethod | None, prompt: LayerTokens, answer: LayerTokens, keep: float) -> tuple[Tensor, Tensor]:
    """(groups,) attention that falls on what is read, and all of it, summed over heads and the steps that choose."""
    groups, heads = prompt.groups, prompt.key.shape[1]
    memory = {} if method is None else method.observe(prompt, {})
    most = int(keep * groups.positions.shape[1])
    found, total = torch.zeros(2, len(groups.row)).unbind(0)
    for step, (query, attention) in enumerate(rows_of(answer), start=1):
        shared = attention.unflatten(1, (heads, -1))
        received = shared.amax(2)
        everything = method is not None and method.refresh is not None and step % method.refresh == 0
        if everything:
            chosen = torch.ones_like(received, dtype=torch.bool)
        else:
            scores = shared.sum(2) if method is None else method.score(memory, query, prompt.scaling)
            picked = scores.argsort(dim=-1, descending=True, stable=True)[..., :most]
            chosen = torch.zeros_like(received, dtype=torch.bool).scatter(2, picked, True)
            found += (shared * chosen.unsqueeze(2)).sum((1, 2, 3))
            total += shared.sum((1, 2, 3))
        if method is not None and method.remembers:
            memory = method.remember(memory, received * chosen, chosen)
    return found, total


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many questions")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    model, processor = glimpse.load()
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "kinds": ", ".join(KINDS)}
    with Results(options.out, "decoding", settings, keys=("method", "keep")) as results:
        if len(results.rows) < len(CANDIDATES) * len(KEEPS):
            measure(model, processor, options.count, results)
    print(markdown([results.folder], "method,recall,recall_low,recall_high", across="keep"))


@torch.inference_mode()
def measure(model: Any, processor: Any, count: int, results: Results) -> None:
    """All methods at every keep, on the same rows of attention."""
    host = find_target(model).host
    methods = {
        name: None if name == BEST else foveate.get_method(name.partition(":")[0], **more).for_host(host)
        for name, more in CANDIDATES.items()
    }
    shares: dict[tuple[str, float], list[float]] = {(name, keep): [] for name in CANDIDATES for keep in KEEPS}
    items = from_glimpse(count, KINDS)
    for number, item in enumerate(items):
        inputs = model_inputs(processor, [item.pictures()], [item.asked[0]])
        answer = processor.tokenizer(item.answers[0], add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([inputs["input_ids"], answer], 1)
        watching = Watching()
        with foveate.prune(model, watching) as pruned, pruned.prompt(inputs["input_ids"].shape[1]):
            model(input_ids=ids, pixel_values=inputs["pixel_values"])
        for (name, keep), found in shares.items():
            parts = [recall(methods[name], prompt, told, keep) for prompt, told in watching.seen]
            total = float(sum(part[1].sum() for part in parts))
            if total:
                found.append(float(sum(part[0].sum() for part in parts)) / total)
        if number % 20 == 19:
            Console(stderr=True).print(f"{number + 1} of {len(items)} questions")
    for (name, keep), found in shares.items():
        off = 1.96 * float(np.std(found)) / len(found) ** 0.5
        mean = float(np.mean(found))
        results.add(
            {"method": name, "keep": keep, "questions": len(found), "recall": mean}
            | {"recall_low": mean - off, "recall_high": mean + off}
        )


if __name__ == "__main__":
    run_script(main)
