"""Fewer image tokens or a smaller model? Accuracy over both, and the law that QueCC's authors fit to it.

    python benchmarks/scaling.py

Three sizes of glimpse answer the same held-out questions with 144 image tokens and fewer. `divprune` chooses these and
needs no training; `quecc` makes them, where there are weights for the model. The law is error = C / N^alpha / T^beta
with N parameters of the LLM and T tokens of the prompt (`tokens=all`), or of the picture alone (`tokens=image`); its
logarithm is fitted by least squares, the intervals (95 %) are those of questions drawn anew. Rows with a minus are two
runs whose LLMs compute about equally much until the first token, on the same questions.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import Answers
from rich.progress import track

import foveate
from foveate import glimpse
from foveate.evaluation import generate
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import Batch, model_inputs
from foveate.evaluation.tables import markdown

MODELS = ("tiny", "small", "glimpse")
METHODS = {"divprune": (36, 16, 4, 1), "quecc": (16, 9, 4, 1)}
KINDS = tuple(kind for kind in glimpse.ONE_PICTURE if kind != "again")
READING = ("number", "word", "line")
BATCH, WHOLE = 5 * len(KINDS), 144
ALIKE = 1.25  # how far apart two prefills may be that count as equally dear
Run = tuple[str, str, int]


def llm_parameters(model: Any) -> int:
    """What multiplies every token: the LLM without its table of words."""
    table = model.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in model.model.language_model.parameters()) - table


def llm_flops(model: Any, tokens: float) -> float:
    """Operations of the LLM until the first token: two for each parameter and token, and attention."""
    text = model.config.text_config
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * tokens**2
    return 2 * llm_parameters(model) * tokens + attention


def fit(wrong: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """alpha, beta and the share of variance that they explain. wrong: (runs, questions); the others (runs,)."""
    error = (wrong.sum(1) + 0.5) / (wrong.shape[1] + 1)  # no run is without errors
    known = np.stack([np.ones(len(error)), -np.log(parameters), -np.log(tokens)], 1)
    found, *_ = np.linalg.lstsq(known, np.log(error), rcond=None)
    rest = np.log(error) - known @ found
    return float(found[1]), float(found[2]), float(1 - rest.var() / np.log(error).var())


def measure(results: Results, count: int) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)  # more of them wait for each other longer than they compute
    questions = glimpse.heldout(count, kinds=KINDS)
    answers = Answers(results.folder, questions, ("model", "method", "tokens"))
    _, processor = glimpse.load()
    batches = []
    for start in range(0, count, BATCH):
        some = questions[start : start + BATCH]
        inputs = model_inputs(processor, [each.images for each in some], [each.question for each in some])
        batches.append(Batch(list(range(start, start + len(some))), inputs))
    text = float(np.mean([n for each in batches for n in (each.inputs["attention_mask"].sum(1) - WHOLE).tolist()]))
    size: dict[str, int] = {}
    flops: dict[Run, float] = {}
    for name in MODELS:
        model, _ = glimpse.load(name)
        size[name] = llm_parameters(model)
        runs = [("untouched", WHOLE), *((method, keep) for method, keeps in METHODS.items() for keep in keeps)]
        for method, keep in track(runs, description=name):
            run: Run = (name, method, keep)
            flops[run] = llm_flops(model, text + keep)
            if results.find(model=name, method=method, tokens=keep, part="answers"):
                continue
            try:
                with nullcontext() if method == "untouched" else foveate.prune(model, method, keep=keep):
                    said = generate(model, processor, batches)
            except foveate.UnsupportedError:
                flops.pop(run)  # no weights for this model
                continue
            right = answers.add(said, model=name, method=method, tokens=keep)
            about = {"model": name, "method": method, "tokens": keep, "part": "answers"}
            about |= {"llm_parameters": size[name], "llm_flops": round(flops[run])}
            results.add(about | answers.means(right))
    compare(results, answers, flops)
    describe(results, answers, size, text)


def compare(results: Results, answers: Answers, flops: dict[Run, float]) -> None:
    """Rows of two runs that cost about the same, the larger model first."""
    for one, other in combinations(sorted(flops, key=lambda run: -MODELS.index(run[0])), 2):
        methods = {one[1], other[1]} - {"untouched"}
        if one[0] == other[0] or len(methods) > 1 or max(flops[one] / flops[other], flops[other] / flops[one]) > ALIKE:
            continue
        gap = np.subtract(*(answers.right(model=run[0], method=run[1], tokens=run[2]) for run in (one, other)))
        label = " - ".join(f"{name} {method} {tokens}" for name, method, tokens in (one, other))
        if not results.find(model=label, method="", tokens=None, part="equal cost"):
            about = {"model": label, "method": "", "tokens": None, "part": "equal cost"}
            results.add(about | {"llm_flops": round(flops[one])} | answers.means(gap))


def describe(results: Results, answers: Answers, size: dict[str, int], text: float) -> None:
    """Rows of the law, for all questions, for reading, and for the others."""
    kinds = np.array([question.kind in READING for question in answers.questions])
    runs = [(name, method, keep) for name in MODELS for method, keep in (("untouched", WHOLE), *_kept("divprune"))]
    right = np.stack([answers.right(model=name, method=method, tokens=keep) for name, method, keep in runs])
    for group, chosen in (("all", kinds | ~kinds), ("reading", kinds), ("others", ~kinds)):
        for sizes in (MODELS, MODELS[1:]):
            rows = [run[0] in sizes for run in runs]
            wrong = 1 - right[rows][:, chosen]
            parameters = np.array([size[run[0]] for run in runs], np.float64)[rows]
            for counted, extra in (("all", text), ("image", 0.0)):
                label = f"law of {group}, {len(sizes)} models, tokens={counted}"
                if results.find(model=label, method="divprune", tokens=None, part="law"):
                    continue
                tokens = np.array([run[2] + extra for run in runs], np.float64)[rows]
                alpha, beta, explained = fit(wrong, parameters, tokens)
                rng = np.random.default_rng(0)
                drawn = [rng.integers(wrong.shape[1], size=wrong.shape[1]) for _ in range(1000)]
                again = np.array([fit(wrong[:, each], parameters, tokens)[:2] for each in drawn])
                low, high = np.percentile(again, [2.5, 97.5], axis=0)
                row: dict[str, Any] = {"model": label, "method": "divprune", "tokens": None, "part": "law"}
                row |= {"alpha": alpha, "alpha_low": float(low[0]), "alpha_high": float(high[0])}
                row |= {"beta": beta, "beta_low": float(low[1]), "beta_high": float(high[1])}
                results.add(row | {"explained": explained})


def _kept(method: str) -> list[tuple[str, int]]:
    return [(method, keep) for keep in METHODS[method]]


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30 * len(KINDS), help="how many held-out questions")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "count": options.count, "batch_size": BATCH}
    settings |= {"device": "cpu", "dtype": "float32", "threads": 1}
    with Results(options.out, "scaling", settings, keys=("model", "method", "tokens", "part")) as results:
        measure(results, options.count)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
