"""What a prefill kept: tokens, bytes, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..layout import Tile
from ..methods.base import Method
from .devices import on
from .forward import Forward
from .scores import Scores


@dataclass(frozen=True)
class ImageTokens:
    """Where an image's tokens are. positions: (n,) logical prompt positions (cross-attention: feature indices)."""

    positions: Tensor
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer.

    kind: what it attends to, the prompt ("self") or image features ("cross"); "state" where it carries a state along
    instead, whose entries are the tokens that it read.
    length: logical entries; kept_length: slots physically held (of the longest sample). What a sliding window left
        behind counts as kept: it leaves the untouched model's cache, too.
    since: "prefill" when the layer never saw the dropped tokens, "decode" when they were evicted after its prefill.
    kept: bool (batch, 1 | kv_heads, length) over logical positions (cross layers: image features), with record=True.
    seen: bool (batch, 1, length), what the layer's prefill attended to, with record=True.
    taken: (batch, q) how much of what the layer made of it each token of the prefill took, 0 where it skipped it,
        with record=True; None where no token can skip it.
    sliding: whether a window passes over it, so that it may hold fewer entries than it kept.
    """

    index: int
    kind: Literal["self", "cross", "state"]
    length: int
    kept_length: int
    since: Literal["prefill", "decode"]
    kept: Tensor | None = None
    seen: Tensor | None = None
    taken: Tensor | None = None
    sliding: bool = False


@dataclass(frozen=True)
class GuideAnswer:
    """What the guide said to the last prompt with images.

    sequences: (batch, prompt + t) the prompt and its answer, as `generate()` returns them.
    scores: (batch,) how far each answer can be trusted, None without an exit threshold.
    exited: whether all scores reached the threshold, so that `generate()` returned this.
    """

    sequences: Tensor = field(repr=False)
    scores: Tensor | None
    exited: bool


@dataclass
class Decoding:
    """What the decoding steps since the prefill read, where a method chooses for each of them.

    read, held: entries of the layers' caches, summed over steps, all layers, samples and KV heads: those that were
    attended to, and all; in layers where nothing is chosen both are the same. chosen: per step and layer the logical
    positions that were attended to, bool (batch, kv_heads | 1, length), with record=True. scores: by layer, for
    `PruneReport.scores`.
    """

    steps: int = 0
    chosen: list[dict[int, Tensor]] = field(default_factory=list, repr=False)
    scores: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _read: Tensor | int = field(default=0, repr=False)
    _held: Tensor | int = field(default=0, repr=False)

    def add(self, read: Tensor | int, held: Tensor | int) -> None:
        """One more step; nothing here waits for the device."""
        self.steps, self._read, self._held = self.steps + 1, self._read + read, self._held + held

    @property
    def read(self) -> int:
        """Entries that were attended to."""
        return int(self._read)

    @property
    def held(self) -> int:
        """Entries that were there."""
        return int(self._held)

    def to_dict(self) -> dict[str, int]:
        """Everything but the masks."""
        return {"steps": self.steps, "read": self.read, "held": self.held}

    @property
    def share(self) -> float:
        """Read over held; 1 where there was no step."""
        return self.read / self.held if self.held else 1.0


@dataclass
class Outcome:
    """What a session tells its user. Places write here what is theirs to say. records: whether also what is large."""

    report: PruneReport | None = None
    guided: GuideAnswer | None = None
    records: bool = False


class PruneReport:
    """What the last prefill kept.

    methods: what was applied. layers: one record per decoder layer. kv_bytes: bytes of all keys and values
    right after the prefill; kv_bytes_unpruned: what the untouched model would hold; kv_bytes_kept: the part of kv_bytes
    that holds what was kept. The rest fills up shorter samples, and heads where these keep differently many, which
    uneven_heads says. decoding: what the steps since then read, under a method that chooses for each of them.
    image_tokens: per sample its images' tokens, with record=True. scores: with record=True, by the name of each method
    that ranks tokens by a number, and by the decoder layer it chose at (0 for in front of the LLM), these numbers:
    float32 (batch, 1 | kv_heads, length) over logical positions (cross layers: image features), NaN where it was not
    asked; the larger, the likelier a token stays. Of a method that chooses for each decoding step they are those of the
    last step in which it did. Under a contrast the layers are those of the reduced view; kv_bytes counts both.
    """

    def __init__(self, forward: Forward, methods: Sequence[Method], record: bool) -> None:
        self.methods = tuple(method.to_dict() for method in methods)
        self._batch, self._kinds = forward.ids.shape[0], forward.target.kinds
        length, features = forward.past + forward.queries, forward.streams["cross"].tokens
        self._length = {"self": length, "state": length, "cross": features}
        sources = forward.target.sources
        layers = [forward.layer(i) for i in range(len(self._kinds))]
        for layer in layers:
            if layer is not None and layer.kind == "cross":
                self._length["cross"] = layer.length
        device = forward.ids.device
        everything = torch.ones(self._batch, 1, length, dtype=torch.bool, device=device)
        if forward.mask is not None:
            everything = forward.mask[:, :length].unsqueeze(1)
        all_features = torch.ones(self._batch, 1, self._length["cross"], dtype=torch.bool, device=device)
        self._all = {"self": everything, "state": everything, "cross": all_features}
        self._past = {"self": forward.past, "state": forward.past, "cross": self._length["cross"] - features}
        # A layer that attends to another one's entries keeps what that one keeps.
        entered = {
            i: forward.entered.get(i) if source == i or source not in forward.lent else forward.lent[source].rows
            for i, source in enumerate(sources)
        }
        self._entered = on(device, entered)
        self._taken = on(device, forward.taken)
        # References, not copies: the masks are only worked out when somebody asks.
        self._windows = [layer is not None and layer.is_sliding for layer in layers]
        self._index = [
            (layer.full_index(self._batch, device).to(device) if layer.index is not None else None)
            if layer is not None
            else self._entered[i].unsqueeze(1)  # type: ignore[union-attr]
            if self._entered[i] is not None
            else None
            for i, layer in enumerate(layers)
        ]
        self._physical = [
            layer.physical if layer is not None else (everything.shape[-1] if index is None else index.shape[-1])
            for layer, index in zip(layers, self._index, strict=True)
        ]
        # What a layer lost behind its own attention, those that borrow from it have seen.
        lost = {i for i, lent in forward.lent.items() if not self._windows[i] and self._physical[i] < lent.slots}
        self._evicted = forward.evicted | {
            i for i, source in enumerate(sources) if i != source and source in forward.evicted | lost
        }
        self.records = record
        held = [layer for layer in forward.held if layer.physical]
        self.kv_bytes = sum(layer.bytes for layer in held)
        self.kv_bytes_unpruned = sum(layer.bytes // layer.physical * layer.most for layer in held)
        self._held = [
            (layer.bytes, layer.full_index(self._batch, device) if layer.index is not None else None) for layer in held
        ]
        self.uneven_heads = any(getattr(layer, "uneven", False) for layer in held)
        self.decoding: Decoding | None = None
        self.scores: Scores = {
            name: dict(on(device, of_layers)) for name, of_layers in forward.scores.items() if record
        }
        self._places = forward.image_tokens()
        self.image_tokens = [[ImageTokens(at, tiles) for at, tiles in row] for row in self._places] if record else None

    def _kept(self, layer: int) -> Tensor:
        index, length = self._index[layer], self._length[self._kinds[layer]]
        if index is None:
            return self._seen(layer)
        kept = _spread(index, length)
        if not self._windows[layer]:
            return kept
        # What a window left behind was not dropped.
        oldest = torch.where(index < 0, length, index).amin(-1, keepdim=True)
        return kept | (self._seen(layer) & (torch.arange(length, device=index.device) < oldest))

    def _seen(self, layer: int) -> Tensor:
        kind, rows = self._kinds[layer], self._entered.get(layer)
        everything = self._all[kind]
        if rows is None:
            return everything
        new = torch.where(rows < 0, -1, rows + self._past[kind]).unsqueeze(1)
        old = torch.arange(everything.shape[-1], device=rows.device) < self._past[kind]
        return (_spread(new, everything.shape[-1]) | old) & everything

    @cached_property
    def layers(self) -> list[LayerReport]:
        """One record per decoder layer."""
        return [
            LayerReport(
                i,
                kind,
                self._length[kind],
                self._physical[i],
                "decode" if i in self._evicted else "prefill",
                self._kept(i) if self.records else None,
                self._seen(i) if self.records else None,
                self._taken.get(i) if self.records else None,
                self._windows[i],
            )
            for i, kind in enumerate(self._kinds)
        ]

    @cached_property
    def kv_bytes_kept(self) -> int:
        """Bytes of the keys and values that were kept."""
        fillers = ((size, index < 0) for size, index in self._held if index is not None)
        return self.kv_bytes - sum(size // room.numel() * int(room.sum()) for size, room in fillers)

    @cached_property
    def images(self) -> list[list[tuple[int, int]]]:
        """Per sample a `(tokens, kept)` for each image, `kept` as the mean over the layers that lost tokens of it."""
        lossy = [i for i, index in enumerate(self._index) if index is not None or self._entered.get(i) is not None]
        masks = [self._kept(i).float().mean(1) for i in lossy]
        counts = []
        for row, places in enumerate(self._places):
            sample = []
            for positions, _ in places:
                kept = [float(mask[row, positions.to(mask.device)].sum()) for mask in masks]
                lost = [k for k in kept if k < len(positions)]
                sample.append((len(positions), round(sum(lost) / len(lost)) if lost else len(positions)))
            counts.append(sample)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Everything but masks and scores, JSON-safe."""
        return {
            "methods": [dict(method) for method in self.methods],
            "images": [[{"tokens": tokens, "kept": kept} for tokens, kept in sample] for sample in self.images],
            "kv_bytes": self.kv_bytes,
            "kv_bytes_unpruned": self.kv_bytes_unpruned,
            "kv_bytes_kept": self.kv_bytes_kept,
            **({} if self.decoding is None else {"decoding": self.decoding.to_dict()}),
            "layers": [
                {name: getattr(layer, name) for name in ("index", "kind", "length", "kept_length", "since")}
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        """One readable line."""
        images = [image for sample in self.images for image in sample]
        tokens, kept = (sum(column) for column in zip(*images, strict=True)) if images else (0, 0)
        names = " + ".join(f"{method['method']} keep={method['keep']}" for method in self.methods)
        clips = sum(tiles[-1].frame > 0 for sample in self._places for _, tiles in sample)
        counts = {"image": len(images) - clips, "clip": clips}
        named = [f"{n} {what}{'s'[: n != 1]}" for what, n in counts.items() if n or (what == "image" and not clips)]
        line = f"{names}: {kept} of {tokens} image tokens in {' and '.join(named)}"
        if self.kv_bytes_unpruned:
            line += (
                f", KV cache {human_bytes(self.kv_bytes)} instead of {human_bytes(self.kv_bytes_unpruned)}"
                f" ({self.kv_bytes / self.kv_bytes_unpruned - 1:+.0%})"
            )
            if self.uneven_heads:
                line += f", {human_bytes(self.kv_bytes_kept)} of it kept and the rest room for each layer's widest head"
        if self.decoding is not None and self.decoding.steps:
            line += f", {self.decoding.share:.0%} of it read in a step"
        return line

    __repr__ = __str__


def _spread(index: Tensor, length: int) -> Tensor:
    """bool (batch, heads, length): True at the entries of `index`, whose -1 are fillers."""
    mask = torch.zeros(*index.shape[:2], length + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(2, torch.where(index < 0, length, index), True)[..., :length]


def human_bytes(size: float) -> str:
    """A size with its unit: 464000 is "464 kB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
