"""What choosing tokens of a clip costs beside the prefill it shortens: time and memory, by frames and method.

    python benchmarks/clip_cost.py
    python benchmarks/clip_cost.py --frames 8,32,128 --device cuda

Frames of 64 tokens at the width of Llama-3.2-1B, random, most places standing still from frame to frame. `share`: the
time of choosing over that of the untouched decoder's prefill, which is one of its 16 layers, timed, times 16; the
vision encoder would come on top. `peak_mb`: the most that choosing holds at once beside the tokens themselves, and
`layer_mb` the same of one decoder layer: what the untouched model needs anyway.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import foveate
from foveate.evaluation import geometries
from foveate.evaluation.plots import COLOURS, MARKERS, STYLE
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown
from foveate.evaluation.timing import synchronize
from foveate.methods.tokens import VideoTokens

METHODS = ("evs", "vidcom2", "dycoke", "fastvid", "holitom", "random_clip", "uniform_frames")
GRID, TEXT, LAYERS = (8, 8), 64, 16


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside the block hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                at, size = storage.data_ptr(), storage.nbytes()
                if not self._users[at]:
                    self._held += size
                self._users[at] += 1
                weakref.finalize(tensor, self._free, at, size)
        self.peak = max(self.peak, self._held)
        return out

    def _free(self, at: int, size: int) -> None:
        self._users[at] -= 1
        if not self._users[at]:
            self._held -= size


def clip(frames: int, width: int, device: str) -> VideoTokens:
    """A clip in which a tenth of the places changes from one frame to the next."""
    rng, n = torch.Generator().manual_seed(0), GRID[0] * GRID[1]
    changes = (torch.rand(frames, n, 1, generator=rng) < 0.1).cumsum(0)
    kinds = torch.randn(int(changes.max()) + 1, n, width, generator=rng)
    features = kinds.gather(0, changes.expand(-1, -1, width)) + 0.1 * torch.randn(frames, n, width, generator=rng)
    cls = torch.rand(1, frames, 1, n, generator=rng)
    return VideoTokens(GRID, 1, frames, torch.device(device), features=features[None].to(device), cls=cls.to(device))


def timed(run: Callable[[], object], device: str, repeat: int) -> float:
    """The median of so many runs after one that warms up, in seconds."""
    seconds = []
    for _ in range(repeat + 1):
        synchronize(torch.device(device))
        begun = time.perf_counter()
        run()
        synchronize(torch.device(device))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def layer_run(frames: int, device: str) -> Callable[[], object]:
    """One decoder layer over the prompt of an untouched model."""
    config = geometries.get_config("1b").text_config
    config._attn_implementation = "sdpa"
    layer, rotary = LlamaDecoderLayer(config, 0).to(device).eval(), LlamaRotaryEmbedding(config).to(device)
    hidden = torch.randn(1, frames * GRID[0] * GRID[1] + TEXT, config.hidden_size, device=device)
    positions = rotary(hidden, torch.arange(hidden.shape[1], device=device)[None])
    return lambda: layer(hidden, position_embeddings=positions)


@torch.inference_mode()
def measure(results: Results, options: argparse.Namespace) -> None:
    """Adds the rows that are missing."""
    width = geometries.get_config("1b").text_config.hidden_size
    for frames in track(options.frames, description="frames"):
        if all(results.find(method=name, frames=frames) for name in METHODS):
            continue
        run = layer_run(frames, options.device)
        prefill = LAYERS * timed(run, options.device, 1)
        with Memory() as layer:
            run()
        tokens = clip(frames, width, options.device)
        budget = torch.tensor([frames * tokens.n // 4], device=options.device)
        for name in METHODS:
            method: Any = foveate.get_method(name)
            choose = partial(method.choose, tokens, budget)
            spent = timed(choose, options.device, options.repeat)
            with Memory() as memory:
                choose()
            sizes = {"peak_mb": memory.peak / 1e6, "layer_mb": layer.peak / 1e6}
            share = {"choosing_ms": 1000 * spent, "prefill_ms": 1000 * prefill, "share": spent / prefill}
            results.add({"method": name, "frames": frames, **share, **sizes})


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, sides = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for side, name, whole, label in zip(
            sides, ("choosing_ms", "peak_mb"), ("prefill_ms", "layer_mb"), ("ms", "MB"), strict=True
        ):
            for number, method in enumerate(METHODS):
                own = [row for row in rows if row["method"] == method]
                marks = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                side.plot([row["frames"] for row in own], [row[name] for row in own], label=method, **marks)
            own = [row for row in rows if row["method"] == METHODS[0]]
            what = "untouched: its prefill (left), one of its layers (right)"
            side.plot([row["frames"] for row in own], [row[whole] for row in own], color="#333333", ls="--", label=what)
            side.set(xscale="log", yscale="log", xlabel="frames of 64 tokens", ylabel=label)
            side.set_xticks([row["frames"] for row in own], [str(row["frames"]) for row in own])
            side.minorticks_off()
        sides[0].set_title("time of choosing")
        sides[1].set_title("memory while choosing")
        sides[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main() -> None:
    """Measures, writes, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=lambda text: [int(part) for part in text.split(",")], default=[8, 32, 128])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="the folder of results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"grid": list(GRID), "keep": 0.25, "repeat": options.repeat, "device": options.device, "threads": 1}
    with Results(options.out, "clip_cost", settings, keys=("method", "frames")) as results:
        measure(results, options)
        plot(sorted(results.rows, key=lambda row: row["frames"]), results.folder / "cost.png")
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
