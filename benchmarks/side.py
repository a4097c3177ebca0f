"""One library's half of beside_kvpress.py, in whose environment it runs: prints a JSON row a line.

    python benchmarks/side.py foveate
    python benchmarks/side.py kvpress

Each way runs in turn with the untouched model, `--repeat` times; the ratios are medians over these turns, of CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StoppingCriteria

IMAGE, TOKENS, BEFORE, BEHIND = 500, 576, 10, 70
STEPS = 33
KEEP = 0.25
WINDOW, KERNEL = 32, 5
# kvpress' ratio is of the whole prompt; this one leaves as many entries.
RATIO = (1 - KEEP) * TOKENS / (BEFORE + TOKENS + BEHIND)
Way = Callable[[], AbstractContextManager[Any]]


def random_model() -> Any:
    """A LLaVA of 0.15 billion parameters with random weights, the same in both environments."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def ways(library: str, model: Any) -> dict[str, Way]:
    """What is measured, by name."""
    if library == "kvpress":
        from kvpress import SnapKVPress

        return {"SnapKVPress": lambda: SnapKVPress(RATIO, window_size=WINDOW, kernel_size=KERNEL)(model)}
    import foveate

    snapkv = foveate.get_method("visual_snapkv", keep=KEEP, window=WINDOW, kernel=KERNEL)
    return {
        "visual_snapkv": lambda: foveate.prune(model, snapkv),
        "divprune": lambda: foveate.prune(model, "divprune", keep=KEEP),
    }


class Clock(StoppingCriteria):
    """Notes the CPU time at each new token, and stops nothing."""

    def __init__(self) -> None:
        self.at = [time.process_time()]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.at.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run(model: Any, inputs: dict[str, Any], way: Way) -> tuple[float, float, int]:
    """Seconds to the first token, seconds of the median step behind it, and bytes of the KV cache at the end."""
    with torch.inference_mode(), way():
        clock = Clock()
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, stopping_criteria=[clock]
        )
    spent = [later - earlier for earlier, later in pairwise(clock.at)]
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    return spent[0], median(spent[1:]), sum(held.keys.nbytes + held.values.nbytes for held in cache.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("foveate", "kvpress"))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model()
    ids = torch.tensor([[3] * BEFORE + [IMAGE] * TOKENS + list(range(5, 5 + BEHIND))])
    noise = torch.randn(1, 3, 336, 336)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise}
    measured = {"untouched": nullcontext, **ways(args.library, model)}
    run(model, inputs, nullcontext)  # the first is slow
    turns = [{name: run(model, inputs, way) for name, way in measured.items()} for _ in range(args.repeat)]
    for name in measured:
        first, step = (median(turn[name][i] / turn["untouched"][i] for turn in turns) for i in (0, 1))
        row = {
            "library": f"{args.library} {version(args.library)}",
            "transformers": version("transformers"),
            "torch": version("torch"),
            "method": name,
            "ttft_ms": 1000 * median(turn[name][0] for turn in turns),
            "ttft_vs_untouched": first,
            "decode_ms": 1000 * median(turn[name][1] for turn in turns),
            "decode_vs_untouched": step,
            "kv_share": turns[0][name][2] / turns[0]["untouched"][2],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
