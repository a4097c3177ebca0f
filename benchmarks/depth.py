"""What does it save that tokens skip layers? Prefill and training step, beside what the operations saved predict.

python benchmarks/depth.py

A language model of random weights reads a clip. `time_share` and `flops_share` are of the untouched model's, which runs
in turn with the other; a training step is forward and backward of language model and routers, without the optimizer,
whose work does not depend on tokens. Runs offline, on one CPU core in about five minutes.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import foveate
from foveate.engine.support import find_target
from foveate.evaluation.cost import counted
from foveate.evaluation.geometries import build
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown
from foveate.evaluation.timing import no_collector, quartiles

FRAME, SIDE, PATCH = 64, 112, 14  # tokens of a frame, its pixels, those of a patch
WORDS = 32  # in front of the frames, and behind them
IMAGE = 1023
Inside = Callable[[], AbstractContextManager[Any]]


def config(layers: int, width: int) -> LlavaConfig:
    """A language model with so many layers of this width, and an encoder that costs little beside it."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=8 * width // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=8192,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=FRAME)


def clip(frames: int) -> dict[str, torch.Tensor]:
    """A prompt of one clip, with labels on its last words."""
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(3, IMAGE, (1, 2 * WORDS), generator=rng)
    ids = torch.cat([words[:, :WORDS], torch.full((1, frames * FRAME), IMAGE), words[:, WORDS:]], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -WORDS // 2 :] = ids[:, -WORDS // 2 :]
    pixels = torch.randn(frames, 3, SIDE, SIDE, generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Everything up to the first token."""
    with torch.inference_mode():
        model(**{name: value for name, value in inputs.items() if name != "labels"}, logits_to_keep=1)


def training_step(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Forward and backward."""
    model(**inputs, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


PASSES = {"prefill": prefill, "training step": training_step}


def flops(run: Callable[[], None], inside: Inside) -> int:
    """Operations of matrix products and attention."""
    with inside():
        return counted(run)


def measure(results: Results, options: argparse.Namespace) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)
    model = build(config(options.layers, options.width), device="cpu", dtype="float32", attn="sdpa")
    inputs, target = clip(options.frames), find_target(model)
    method = foveate.VideoLLMMoD(keep=options.keep)
    weights = {name: tensor.requires_grad_() for name, tensor in method.initial(target.host).items()}
    target.decoder.requires_grad_(True)
    insides: dict[str, Inside] = {
        "untouched": nullcontext,
        "videollm_mod": lambda: foveate.prune(model, method.holding(weights)),
    }
    for name, one_pass in PASSES.items():
        if all(results.find(run=name, method=label) for label in insides):
            continue

        def run(one_pass: Callable[..., None] = one_pass) -> None:
            one_pass(model, inputs)

        seconds: dict[str, list[float]] = {label: [] for label in insides}
        with no_collector():
            for turn in range(options.repeat + 1):
                for label in insides if turn % 2 else reversed(insides):
                    with insides[label]():
                        begun = time.perf_counter()
                        run()
                        if turn:  # the first warms up
                            seconds[label].append(time.perf_counter() - begun)
        done = {label: flops(run, inside) for label, inside in insides.items()}
        for label, taken in seconds.items():
            if results.find(run=name, method=label):
                continue
            pairs = [own / full for own, full in zip(taken, seconds["untouched"], strict=True)]
            low, middle, high = quartiles(pairs)
            row = {"run": name, "method": label, "ms": round(1000 * quartiles(taken)[1], 1)}
            row |= {"gflops": round(done[label] / 1e9, 2), "flops_share": done[label] / done["untouched"]}
            results.add(row | {"time_share": middle, "time_share_q1": low, "time_share_q3": high})


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024, help="of the language model")
    parser.add_argument("--frames", type=int, default=8, help=f"of {FRAME} tokens")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings |= {"device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    with Results(options.out, "depth", settings, keys=("run", "method")) as results:
        measure(results, options)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
