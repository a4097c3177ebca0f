"""What pruning itself costs: decode steps at keep = 1.0 beside the untouched model, step by step in turn.

    python benchmarks/overhead.py --layers 24 --width 1024

Both run in one process on the same weights and the same tokens; every pruned step follows an untouched one, and
medians are compared. Prints a table and writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate

IMAGE, VOCABULARY = 1, 1000


def build(layers: int, width: int, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A random LLaVA: a small encoder with 576 image tokens, a decoder of the given size."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).to(device, dtype).eval()


def timed(model: LlavaForConditionalGeneration, token: torch.Tensor, cache: object) -> float:
    """Milliseconds of one decode step."""
    start = time.perf_counter()
    model(input_ids=token, past_key_values=cache, use_cache=True)
    if token.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def measure(model: LlavaForConditionalGeneration, method: str, steps: int, device: str) -> dict[str, float]:
    """Median milliseconds of a decode step, untouched and pruned at keep = 1.0, and the median of paired ratios."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, VOCABULARY, (1, 8 + 576 + 24), generator=generator)
    prompt[:, 8:584] = IMAGE
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    inputs = {"input_ids": prompt.to(device), "pixel_values": pixels.to(device, model.dtype), "use_cache": True}
    plain = model(**inputs).past_key_values
    with foveate.prune(model, method, keep=1.0):
        pruned = model(**inputs).past_key_values
    token = torch.randint(2, VOCABULARY, (1, 1), generator=generator).to(device)
    untouched, ours = [], []
    for step in range(steps + 5):
        a = timed(model, token, plain)
        with foveate.prune(model, method, keep=1.0):
            b = timed(model, token, pruned)
        if step >= 5:  # warm-up
            untouched.append(a)
            ours.append(b)
    ratios = [b / a for a, b in zip(untouched, ours, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {
        "untouched_ms": median(untouched),
        "pruned_ms": median(ours),
        "ratio_of_medians": median(ours) / median(untouched),
        "median_of_ratios": median(ratios),
        "ratio_quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", default="fopru,fastv,plphp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    args = parser.parse_args()
    model = build(args.layers, args.width, args.device, getattr(torch, args.dtype))
    table = Table("method", "untouched ms", "keep 1.0 ms", "ratio of medians", "paired ratios: median, quartiles")
    rows = {}
    for method in args.methods.split(","):
        rows[method] = row = measure(model, method, args.steps, args.device)
        low, high = row["ratio_quartiles"]
        spread = f"{row['median_of_ratios']:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(
            method,
            f"{row['untouched_ms']:.2f}",
            f"{row['pruned_ms']:.2f}",
            f"{row['ratio_of_medians']:.3f}",
            spread,
        )
    Console().print(table)
    run = {
        "command": "python " + " ".join(["benchmarks/overhead.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "foveate": foveate.__version__,
        },
        "settings": {"layers": args.layers, "width": args.width, "steps": args.steps, "dtype": args.dtype},
        "methods": rows,
    }
    args.out.write_text(json.dumps(run, indent=2) + "\n")


if __name__ == "__main__":
    main()
