"""VideoLLM-MoD: of every frame only some tokens go through a routed layer; the others skip it and come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from . import register
from .base import DepthMethod
from .baselines import drawn, evenly, seeded
from .budgets import check_choice, check_range, floor_budget, topk_mask
from .host import Host
from .tokens import ImageGroups
from .trained import TrainedMethod

Insertion = Literal["interleaved", "interleaved-deep", "all", "all-deep"]


def routed_layers(insertion: Insertion, depth: int) -> tuple[int, ...]:
    """The layers that tokens may skip: every second one from 1 on, or all; `deep`: those of the deeper half alone."""
    first = depth // 2 if insertion.endswith("deep") else 0
    return tuple(layer for layer in range(first, depth) if layer % 2 or insertion.startswith("all"))


def router_logits(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How much each token needs the layer. states: (groups, n, hidden); weight: (hidden,); bias: (). Returns float32
    (groups, n)."""
    return states.float() @ weight + bias


def router_weight(logits: Tensor) -> Tensor:
    """What a token takes of the layer's update: between 0.8 and 1.2, so that the choice is learned with the answers."""
    return 0.2 * logits.tanh() + 1


@register("videollm_mod")
@dataclass
class VideoLLMMoD(TrainedMethod, DepthMethod):
    """In routed layers a small part of each frame's tokens is computed; the others skip the layer, not the model.

    In front of a routed layer a router, one linear map of that layer's own, scores the tokens of each image (each frame
    of a clip). The best `keep` of them and all text go through the layer, with keys and values of theirs alone; a token
    h that went through becomes h + w * (layer(h) - h), one that did not is h again. Decoding steps go through every
    layer, with shorter caches in the routed ones.

    keep: fraction of each frame's tokens, or tokens per frame, that go through a routed layer; 0.2 is inferred from the
        paper's abstract.
    layers: the routed ones: "interleaved" (1, 3, 5, ...), which the paper finds best, "all", the deeper half of either
        ("interleaved-deep", "all-deep"), or their numbers, counted from 0.
    router: "learned", trained for the model at hand, or the arms it has to beat: "random" draws (in each layer anew),
        "uniform" takes an even stride.
    seed: of the random draw, which depends on it, the layer and the frame's size alone.
    weights: of the learned router: a file or folder; None for those that come with the library.

    Source: VideoLLM-MoD, arXiv 2408.16730 (places, insertions and arms from its abstract and captions; no code is
    public). The router, its weight w = 0.2 * tanh(score) + 1 and the odd layers are those of a relative's code, p-MoD
    (arXiv 2412.04449), which also scales what skips; here, as the paper's abstract says, that comes back unchanged.
    """

    summary = "of each frame only some tokens go through a routed layer, the others skip it and come back"
    source = "VideoLLM-MoD, arXiv 2408.16730"
    fixed: ClassVar[tuple[str, ...]] = ("keep", "layers")

    keep: float | int = 0.2
    layers: tuple[int, ...] | Insertion = "interleaved"
    router: Literal["learned", "random", "uniform"] = "learned"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("seed", self.seed, 0, 2**63 - 1, integer=True)
        check_choice("router", self.router, ("learned", "random", "uniform"))
        if self.router != "learned" and self.weights is not None:
            raise ValueError(f'weights are of the learned router: use router="learned", not {self.router!r}')
        if isinstance(self.layers, (tuple, list)):  # JSON knows no tuples
            self.layers = tuple(self.layers)
            for layer in self.layers:
                check_range("layers", layer, 0, integer=True)
        elif self.layers not in get_args(Insertion):
            raise ValueError(f"layers must be {', '.join(get_args(Insertion))} or a tuple, got {self.layers!r}")

    def routed(self, depth: int) -> tuple[int, ...]:
        return self.layers if isinstance(self.layers, tuple) else routed_layers(self.layers, depth)

    def initial(self, host: Host) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for layer in self.routed(host.depth) if self.router == "learned" else ():
            # Nearly nothing, but not zeros: equal scores would send the first tokens of every frame through.
            start = 1e-3 * (seeded((self.seed * 1009 + layer) % 2**63, host.hidden) - 0.5)
            tensors |= {f"{layer}.weight": start.to(host.device), f"{layer}.bias": torch.zeros((), device=host.device)}
        return tensors

    def for_host(self, host: Host) -> TrainedMethod:
        return super().for_host(host) if self.router == "learned" else self

    def score(self, states: Tensor, groups: ImageGroups, layer: int) -> Tensor | None:
        if self.router == "uniform":
            return None
        if self.router == "random":
            return drawn(groups.present, (self.seed * 1009 + layer) % 2**63)[:, 0]
        weight, bias = (self.tensors[f"{layer}.{part}"].to(states.device) for part in ("weight", "bias"))
        return router_logits(states, weight, bias)

    def select(self, states: Tensor, groups: ImageGroups, layer: int) -> tuple[Tensor, Tensor | None]:
        budget, scores = floor_budget(self.share(groups), groups), self.score(states, groups, layer)
        if scores is None:
            return evenly(groups.present, budget), None
        chosen = topk_mask(scores.masked_fill(~groups.present, -torch.inf), budget)
        return chosen, router_weight(scores) if self.router == "learned" else None
