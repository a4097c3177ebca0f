"""Do the cross-attention layers of a model look at the same features? The premise of Trimmed-Llama, on glimpse-cross.

python benchmarks/cross_maps.py

For each cross-attention layer, what the text of "Describe the picture." pays to the patches: which share of it goes to
patches with things on them, beside the share of patches that have any, and how its ranking of the patches agrees with
that of the first of these layers, in which Trimmed-Llama chooses (Spearman's correlation). Means over pictures that no
table of answers uses. Runs offline, in half a minute.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate import glimpse
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.runner import model_inputs
from foveate.evaluation.tables import markdown
from foveate.glimpse.drawing import coverage, render
from foveate.glimpse.scene import imagine

FIRST = 500_000


def paid(model: Any, inputs: Any) -> dict[int, Tensor]:
    """What the text pays to each patch in each cross-attention layer, mean over heads: float32 (patches,)."""
    seen: dict[int, Tensor] = {}
    layers = model.model.language_model.layers
    crossing = [index for index, layer in enumerate(layers) if hasattr(layer, "cross_attn")]
    image = inputs["input_ids"][0].eq(model.config.image_token_id).nonzero().item()

    def note(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[index] = output[1][0, :, image:].sum(1).mean(0)[1:]  # the first feature is [CLS]

        return hook

    hooks = [layers[index].cross_attn.register_forward_hook(note(index)) for index in crossing]
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def ranks(values: Tensor) -> np.ndarray:
    """The place of each value among all, from the smallest on."""
    return np.argsort(np.argsort(values.numpy()))


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many pictures")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = glimpse.load("cross", attn_implementation="eager")
    found: dict[int, list[tuple[float, float, float]]] = {}
    for number in range(options.count):
        scene = imagine(np.random.default_rng(glimpse.HELDOUT_VERSION * 1_000_000 + FIRST + number))
        things = coverage(scene).reshape(-1) >= 0
        maps = paid(model, model_inputs(processor, [render(scene)], ["Describe the picture."]))
        first = ranks(maps[min(maps)])
        for layer, attention in maps.items():
            share = float(attention.numpy()[things].sum() / attention.sum())
            alike = float(np.corrcoef(first, ranks(attention))[0, 1])
            found.setdefault(layer, []).append((share, float(things.mean()), alike))
    settings = {"data": f"glimpse {glimpse.HELDOUT_VERSION}", "first": FIRST, "count": options.count}
    with Results(options.out, "cross_maps", settings, keys=("layer",)) as results:
        for layer, rows in sorted(found.items()):
            if not results.find(layer=layer):
                on_things, patches, alike = np.mean(rows, axis=0).round(4).tolist()
                row = {"layer": layer, "attention_on_things_share": on_things, "patches_with_things_share": patches}
                results.add(row | {"correlation_with_first": alike})
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
