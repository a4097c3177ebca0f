"""VisToG: learned semantic tokens read the picture beside its patches, and gather them into groups before the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ..errors import UnsupportedError
from . import register
from .base import EncoderMethod
from .host import Host
from .tokens import EncoderTokens
from .trained import TrainedMethod


def affinity(query: Tensor, key: Tensor) -> Tensor:
    """How well each patch fits each group: their scaled product.

    query: (tiles, m, d), of the semantic tokens. key: (tiles, n, d), of the patches. Returns (tiles, m, n).
    """
    return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def members(affinities: Tensor) -> Tensor:
    """Each patch joins the group it fits best, the first of several. affinities: (tiles, m, n). Returns bool alike."""
    groups = torch.arange(affinities.shape[-2], device=affinities.device).unsqueeze(-1)
    return affinities.argmax(-2, keepdim=True) == groups


def mean_of_members(joins: Tensor, values: Tensor, eps: float = 1.0) -> Tensor:
    """The sum of each group's values over its size plus eps, so that small groups speak softly and empty ones not.

    joins: (tiles, m, n), 1 where a patch is in a group and else 0. values: (tiles, n, d). Returns (tiles, m, d).
    """
    return joins @ values / (joins.sum(-1, keepdim=True) + eps)


def centroids(affinities: Tensor) -> Tensor:
    """The patch whose place each group takes: of its members the one that fits best, the first of several.

    Empty groups take the patches that are left, in order. affinities: (tiles, m, n), m <= n. Returns int64 (tiles, m),
    no patch twice.
    """
    tiles, _, n = affinities.shape
    joins = members(affinities)
    filled = joins.any(-1)
    best = affinities.masked_fill(~joins, -torch.inf).argmax(-1)
    taken = torch.zeros(tiles, n + 1, dtype=torch.uint8, device=best.device).scatter(1, best.where(filled, n), 1)
    left = taken[:, :n].argsort(dim=1, stable=True)
    return best.where(filled, left.gather(1, ((~filled).cumsum(-1) - 1).clamp(min=0)))


@register("vistog")
@dataclass
class VisToG(TrainedMethod, EncoderMethod):
    """Learned semantic tokens read the frozen encoder's patches, and every patch joins one of them.

    The semantic tokens go through the vision encoder beside the patches, which do not see them. In one grouping layer
    behind it each patch joins the semantic token that it fits best; the mean of a group's members, projected, is added
    to its semantic token, and goes to the LLM through a copy of the projector that was trained along. The LLM and the
    encoder are those of the model, untouched. Tiled models: every tile has all the groups. A tile of no more tokens
    than groups stays as it is, and what carries structure (newlines, a [CLS] that is handed on) stays beside them.

    keep: how many semantic tokens there are, an int: what each tile (of a model without tiles, each image) becomes. The
        weights fix it; 16 is this library's default, a ninth of glimpse's tokens. The paper's numbers are not known
        here.
    grouping: hard, every patch in one group, as the paper has it; soft, each semantic token attends to all patches
        (cross-attention), for comparison. The weights fix it.
    carriers: where the groups stand. centroid: at the place of the patch that fits best, so that positions still say
        where; first: at the tile's first tokens. The weights fix it; centroid is this library's default.
    weights: a file that training/vistog.py wrote, or its folder; None for those that come with the library, for
        glimpse.

    Source: VisToG, arXiv 2411.17773: semantic tokens with isolated attention, one grouping layer. The layer's
    arithmetic is that of GroupViT, arXiv 2202.11094, in transformers; the MLP behind it is left to the projector here.
    The paper trains the LLM along; these weights are trained alone.
    """

    summary = "learned semantic tokens gather the patches into groups, before the LLM"
    source = "VisToG, arXiv 2411.17773"
    reads = frozenset({"readers", "states", "features"})
    fixed = ("keep", "grouping", "carriers")

    keep: float | int = 16
    grouping: Literal["hard", "soft"] = "hard"
    carriers: Literal["centroid", "first"] = "centroid"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("grouping", ("hard", "soft")), ("carriers", ("centroid", "first"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")

    def initial(self, host: Host) -> dict[str, Tensor]:
        if not isinstance(self.keep, int):
            raise ValueError(f"keep must be an int for vistog, the number of its groups; got {self.keep}")
        projector = host.projector()
        width = next((weight.shape[1] for weight in projector.values() if weight.ndim > 1), None)
        if width is None:
            raise UnsupportedError(f"vistog needs a projector that works token by token, which {host.model_type} lacks")
        eye, ones = torch.eye(width, device=host.device), torch.ones(width, device=host.device)
        weights = {f"projector.{name}": weight for name, weight in projector.items()}
        assert host.encoder is not None  # the engine took the model
        seen = host.encoder.width
        weights["seeds"] = 0.02 * torch.randn(self.keep, seen, device=host.device)
        if seen != width:  # the projector takes several layers' states side by side
            weights["lift.weight"] = torch.eye(seen, device=host.device).repeat(width // seen, 1)
        # As nothing was learned yet, patches join the semantic token that they resemble, and outweigh it.
        layer = {"query": eye, "key": eye, "value": eye, "out": 3 * eye, "group_norm": ones, "patch_norm": ones}
        for name, weight in layer.items():
            weights |= {f"{name}.weight": weight.clone(), f"{name}.bias": torch.zeros_like(ones)}
        return weights

    @property
    def fills_budget(self) -> bool:
        return False  # every tile becomes as many groups as the weights were trained for

    @property
    def seeds(self) -> Tensor | None:
        return self.tensors["seeds"]

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        n = tokens.grid[0] * tokens.grid[1]
        if n <= self.keep:
            return torch.ones(tokens.tiles, n, dtype=torch.bool, device=tokens.device)
        none = torch.zeros(tokens.tiles, n, dtype=torch.bool, device=tokens.device)
        return none.scatter(1, self._carriers(self._affinity(tokens)), True)

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        if keep.shape[1] <= self.keep:
            return None
        assert tokens.states is not None and tokens.features is not None
        affinities = self._affinity(tokens)
        values, soft = self._linear("value", tokens.states.float()), self.grouping == "soft"
        mixed = affinities.softmax(-1) @ values if soft else mean_of_members(self.joins(affinities), values)
        grouped = self._project(tokens, self._readers(tokens) + self._linear("out", mixed))
        at = self._carriers(affinities).unsqueeze(-1).expand_as(grouped)
        return torch.zeros_like(tokens.features, dtype=torch.float32).scatter(1, at, grouped)

    def joins(self, affinities: Tensor) -> Tensor:
        """Which patch is in which group, float32; training makes it differentiable. affinities: (tiles, m, n)."""
        return members(affinities).float()

    def _affinity(self, tokens: EncoderTokens) -> Tensor:
        assert tokens.states is not None
        group, patch = self._norm("group_norm", self._readers(tokens)), self._norm("patch_norm", tokens.states)
        return affinity(self._linear("query", group), self._linear("key", patch))

    def _readers(self, tokens: EncoderTokens) -> Tensor:
        """The semantic tokens behind the encoder, as wide as what the projector gets."""
        assert tokens.readers is not None
        readers, lift = tokens.readers.float(), self.tensors.get("lift.weight")
        return readers if lift is None else readers @ lift.to(readers).T

    def _carriers(self, affinities: Tensor) -> Tensor:
        if self.carriers == "centroid":
            return centroids(affinities)
        return torch.arange(affinities.shape[1], device=affinities.device).expand(len(affinities), -1)

    def _norm(self, name: str, states: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"{name}.{part}"].to(states.device) for part in ("weight", "bias"))
        return layer_norm(states.float(), weight.shape, weight, bias)

    def _linear(self, name: str, states: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"{name}.{part}"].to(states.device) for part in ("weight", "bias"))
        return linear(states, weight, bias)

    def _project(self, tokens: EncoderTokens, states: Tensor) -> Tensor:
        """The trained copy of the projector: the model's module with weights of its own."""
        assert isinstance(tokens.project, nn.Module)
        own = {name[10:]: weight for name, weight in self.tensors.items() if name.startswith("projector.")}
        weights = {name: weight.to(states.device) for name, weight in own.items()}
        return torch.func.functional_call(tokens.project, weights, states, strict=True).float()
