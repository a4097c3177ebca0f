"""What choosing costs: the time of each method's selection alone, beside the prefill of a 1-billion-parameter LLM.

    python benchmarks/selection.py

Every registered method runs on plain tensors of the sizes that the 1b geometry gives it (Llama-3.2-1B and CLIP-L, one
picture between 64 text tokens): all its stages, or all the layers it evicts from. `selection` is what the method
itself computes; `reading` is what the engine must work out for it first, attention of the vision encoder or of the
cross-attention layer that the model's own kernels do not hand over. Both stand beside the prefill of the same LLM on
as many tokens, in one process. At long prompts two layers run for all, of the prefill and of methods in the KV cache,
and their times are multiplied (`layers_timed`).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import foveate
from foveate.asking.options import check_alone, parse_methods
from foveate.engine.support import find_target
from foveate.evaluation import geometries
from foveate.evaluation.results import Results, run_script
from foveate.evaluation.tables import markdown
from foveate.evaluation.timing import quartiles, synchronize
from foveate.evaluation.workplace import device_name
from foveate.methods.attention import attention_marginals, prefix_attention, received_by_features
from foveate.methods.base import CacheMethod, CrossMethod, EncoderMethod, LayerMethod, Method, VideoMethod
from foveate.methods.tokens import EncoderTokens, ImageGroups, LayerTokens
from foveate.methods.trained import TrainedMethod

BEFORE, AFTER = 32, 32  # text tokens
SIZES = (576, 2880, 10_000)
Work = Callable[[], Any]


class Sizes:
    """Random tensors of the shapes that the 1b geometry shows a method for a picture of n tokens."""

    def __init__(self, model: Any, n: int) -> None:
        self.n, self.device, self.dtype = n, model.device, model.dtype
        self.text, self.vision = model.config.text_config, model.config.vision_config
        self.projector = model.model.multi_modal_projector
        rows = math.isqrt(n)
        self.grid = next((r, n // r) for r in range(rows, 0, -1) if n % r == 0)
        self.length = BEFORE + n + AFTER
        self.rng = torch.Generator(self.device).manual_seed(n)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device).to(self.dtype)

    def attention(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device).softmax(-1)

    def vision_heads(self) -> tuple[Tensor, Tensor, float]:
        heads = self.vision.num_attention_heads
        dim = self.vision.hidden_size // heads
        return self.noise(1, heads, 1 + self.n, dim), self.noise(1, heads, 1 + self.n, dim), dim**-0.5

    def encoder(self, method: EncoderMethod) -> EncoderTokens:
        layers, width = method.vision_layers, self.vision.hidden_size
        states = self.noise(1, self.n, width)
        every: dict[str, Any] = {
            "received": self.attention(1, layers, self.n),
            "given": self.attention(1, layers, self.n),
            "cls": self.attention(1, layers, self.n),
            "keys": self.noise(1, self.n, width // self.vision.num_attention_heads),
            "states": states,
            "features": self.projector(states),
            "words": self.noise(1, AFTER, self.text.hidden_size),
        }
        read = {name: tensor for name, tensor in every.items() if name in method.reads}
        if "states" in read:
            read["features"] = every["features"]
        if "words" in read:
            read["behind"] = torch.ones(1, AFTER, dtype=torch.bool, device=self.device)
        return EncoderTokens(self.grid, 1, self.device, project=self.projector, most=self.budget(method), **read)

    def budget(self, method: Method) -> int:
        return max(1, math.floor(method.keep * self.n)) if isinstance(method.keep, float) else method.keep

    def layer(self) -> LayerTokens:
        heads, kv, dim = self.text.num_attention_heads, self.text.num_key_value_heads, self.text.head_dim
        positions = torch.arange(BEFORE, BEFORE + self.n, device=self.device).unsqueeze(0)
        one = torch.ones(1, dtype=torch.long, device=self.device)
        rows, columns = self.grid
        centers = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns)
        groups = ImageGroups(positions, 0 * one, self.n * one, 0 * one, centers=centers.unsqueeze(0).to(self.device))
        return LayerTokens(
            groups=groups,
            slots=positions,
            query=self.noise(1, heads, self.length, dim),
            key=self.noise(1, kv, self.length, dim),
            value=self.noise(1, kv, self.length, dim),
            scaling=dim**-0.5,
            visible=None,
            last=one * (self.length - 1),
            text=torch.arange(BEFORE + self.n, self.length, device=self.device).unsqueeze(0),
            entered=self.noise(1, self.length, self.text.hidden_size),
            left=self.noise(1, self.length, self.text.hidden_size),
            embedded=self.noise(1, self.length, self.text.hidden_size),
            depth=self.text.num_hidden_layers,
        )


def without(tokens: LayerTokens, chosen: Tensor, stage: int) -> LayerTokens:
    """What a later stage sees: the tokens that an earlier one left."""
    groups = tokens.groups
    alive = torch.ones(tokens.query.shape[2], dtype=torch.bool, device=chosen.device)
    alive[tokens.slots[0]] = chosen[0]
    place = alive.cumsum(0) - 1
    left, count = tokens.slots[:, chosen[0]], chosen.sum(-1)
    groups = dataclasses.replace(
        groups,
        positions=groups.positions[:, chosen[0]],
        count=count,
        dropped=groups.dropped + groups.count - count,
        centers=groups.centers[:, chosen[0]] if groups.centers is not None else None,
    )
    states = {
        name: states[:, alive]
        for name in ("entered", "left", "embedded")
        if (states := getattr(tokens, name)) is not None
    }
    return dataclasses.replace(
        tokens,
        groups=groups,
        slots=place[left],
        query=tokens.query[:, :, alive],
        key=tokens.key[:, :, alive],
        value=None,
        last=place[tokens.last],
        text=place[tokens.text],
        stage=stage,
        **states,
    )


def encoder_work(method: EncoderMethod, sizes: Sizes) -> tuple[Work, Work | None]:
    tokens, budget = sizes.encoder(method), torch.tensor([sizes.budget(method)], device=sizes.device)

    def select() -> None:
        method.merge(tokens, method.select(tokens, budget))

    if not method.reads & {"received", "given", "cls", "keys"}:
        return select, None
    query, key, scaling = sizes.vision_heads()

    def read() -> None:
        for _ in range(method.vision_layers):
            if method.reads & {"received", "given"}:
                attention_marginals(query, key, scaling, 1)
            if "cls" in method.reads:
                prefix_attention(query, key, scaling, 1)
        if "keys" in method.reads:
            key[:, :, 1:].mean(1)

    return select, read


def layer_work(method: LayerMethod, sizes: Sizes) -> tuple[Work, None]:
    stages, tokens = [], sizes.layer()
    for stage in range(len(method.stages(tokens.depth))):
        stages.append(tokens)
        tokens = without(tokens, method.select(tokens), stage + 1)

    def select() -> None:
        for each in stages:
            method.merge(each, method.select(each))

    return select, None


def cache_work(method: CacheMethod, sizes: Sizes) -> tuple[Work, None]:
    tokens = sizes.layer()
    layers = timed_layers(sizes.n, tokens.depth - method.first_layer())
    tokens = dataclasses.replace(tokens, entered=None, left=None, embedded=None)

    def select() -> None:
        scores = [method.score(tokens) for _ in range(layers)]
        if method.needs_all_layers:
            statistics = torch.stack([method.statistics(each, tokens.groups) for each in scores])
            budgets = list(method.budgets(statistics, tokens.groups))
        else:
            budgets = [method.budget(each, tokens) for each in scores]
        for each, budget in zip(scores, budgets, strict=True):
            method.merge(method.select(each, budget), tokens.groups)

    return select, None


def cross_work(method: CrossMethod, sizes: Sizes) -> tuple[Work, Work]:
    tokens = sizes.layer()
    heads, text = sizes.text.num_attention_heads, BEFORE + AFTER
    query, key = tokens.query[:, :, :text], tokens.key[:, :, : sizes.n]
    attention = sizes.attention(1, heads, sizes.n)
    valid = torch.ones(1, sizes.n, dtype=torch.bool, device=sizes.device)
    images = torch.ones(1, dtype=torch.long, device=sizes.device)
    rows = torch.ones(1, text, dtype=torch.bool, device=sizes.device)

    def read() -> None:
        received_by_features(query, key, tokens.scaling, None, rows)

    return lambda: method.select(attention, valid, images), read


def timed_layers(n: int, layers: int) -> int:
    """How many layers run: at long prompts two stand for all, since layers are alike."""
    return layers if n <= 1000 else min(2, layers)


WORK: tuple[tuple[type[Method], Callable[..., tuple[Work, Work | None]]], ...] = (
    (EncoderMethod, encoder_work),
    (LayerMethod, layer_work),
    (CacheMethod, cache_work),
    (CrossMethod, cross_work),
)


def clock(work: Work, repeat: int, device: torch.device) -> list[float]:
    """Milliseconds of `repeat` runs, after one that warms up; a run of more than 20 seconds is not repeated."""
    times: list[float] = []
    for turn in range(repeat + 1):
        gc.collect()
        synchronize(device)
        begun = time.perf_counter()
        work()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - begun))
        if turn == 0 and times[0] > 20_000:
            return times
    return times[1:]


def prefill(model: Any, length: int, layers: int) -> Work:
    """The LLM on so many tokens, through its first `layers` layers only."""
    decoder = model.model.language_model
    embeds = torch.randn(1, length, decoder.config.hidden_size, device=model.device).to(model.dtype)

    def work() -> None:
        every = decoder.config.num_hidden_layers
        try:
            decoder.config.num_hidden_layers = layers
            decoder(inputs_embeds=embeds, use_cache=True)
        finally:
            decoder.config.num_hidden_layers = every

    return work


def wanted(methods: str, keep: float, console: Console) -> Iterator[tuple[str, Method]]:
    """Each method, and how it is called. methods: as `foveate eval` takes them."""
    check_alone(methods)
    for (part,) in parse_methods(methods):
        name = part.name
        try:
            method = foveate.get_method(name, keep=keep, **part.options)
        except ValueError as error:
            console.print(f"left out: {error}")
            continue
        if isinstance(method, TrainedMethod) and not isinstance(method, CacheMethod):
            console.print(f"left out: {name} has weights of its own: foveate bench times it")
        elif isinstance(method, VideoMethod):
            console.print(f"left out: {name} compares the frames of a clip: benchmarks/clip_cost.py times it")
        elif not isinstance(method, tuple(base for base, _ in WORK)):
            console.print(f"left out: {name} chooses while it decodes: foveate bench times it")
        else:
            yield str(part), method


@torch.inference_mode()
def measure(
    model: Any, methods: list[tuple[str, Method]], sizes: list[int], repeat: int, results: Results, console: Console
) -> None:
    depth, host = model.config.text_config.num_hidden_layers, find_target(model).host
    for n in sizes:
        missing = [one for one in methods if not results.find(method=one[0], image_tokens=n)]
        if not missing:
            continue
        layers = timed_layers(n, depth)
        times = clock(prefill(model, BEFORE + n + AFTER, layers), 3 if n <= 3000 else 1, model.device)
        whole = median(times) * depth / layers
        console.print(f"{n:,} tokens: prefill {whole:,.0f} ms")
        for name, method in missing:
            make = next(make for base, make in WORK if isinstance(method, base))
            select, read = make(method.untrained().for_host(host), Sizes(model, n))
            scale = 1.0
            if isinstance(method, CacheMethod):
                own = depth - method.first_layer()
                scale = own / timed_layers(n, own)
            low, middle, high = (scale * each for each in quartiles(clock(select, repeat, model.device)))
            reading = None if read is None else median(clock(read, repeat, model.device))
            row = {"method": name, "image_tokens": n, "selection_ms": middle}
            row |= {"selection_q1_ms": low, "selection_q3_ms": high, "reading_ms": reading, "prefill_ms": whole}
            row |= {"prefill_runs": len(times), "layers_timed": layers}
            results.add(row | {"of_prefill_share": (middle + (reading or 0)) / whole})
            console.print(f"  {name}: {middle:,.2f} ms, {100 * middle / whole:.2f} %; reading {reading}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(foveate.methods()))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="image tokens")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--geometry", default="1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="the folder of results")
    args = parser.parse_args()
    console = Console(stderr=True)
    methods = list(wanted(args.methods, args.keep, console))
    sizes = [int(size) for size in args.sizes.split(",")]
    settings = {name: getattr(args, name) for name in ("geometry", "dtype", "keep", "repeat")}
    settings |= {"device": device_name(args.device), "threads": torch.get_num_threads()}
    with Results(args.out, "selection", settings, keys=("method", "image_tokens")) as results:
        config = geometries.get_config(args.geometry)
        model = geometries.build(config, device=args.device, dtype=args.dtype, attn=None)
        measure(model, methods, sizes, args.repeat, results, console)
    print(markdown([results.folder]))


if __name__ == "__main__":
    run_script(main)
