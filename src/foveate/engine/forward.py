"""One forward pass of a pruned model: its tokens and images, and which rows are still computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout import Tile
from ..methods.tokens import ImageGroups
from .cache import PrunedLayer
from .devices import on
from .gaps import layers_of
from .images import EncodedImage, group_images, place_images, repeated
from .masks import says_more
from .once import Once
from .rows import Lent, Rows, Stream, compact, gather_rows
from .scores import Scores
from .target import Target

_FOLLOWS = {"ids", "mask", "is_image", "text", "places", "groups", "guidance", "lent", "_pending", "_through", "_aside"}
"""What a forward knows that is made of tensors."""


@dataclass(frozen=True)
class _Aside:
    """What waits behind a layer that not all rows go through: hidden states (batch, rows, d) in front of it, which of
    these rows went in, (batch, width), and what was known of the pass before."""

    hidden: Tensor
    source: Tensor
    rows: Rows | None
    groups: ImageGroups | None
    beside: Once


class Forward:
    """State of one forward pass; lives between the base model's hooks.

    arguments: of the base model. brings_images: whether pictures come with this pass. past, queries: tokens before it,
    and of it. mask: bool (batch, past + queries), None where nothing is hidden. encoded: the images of each medium once
    they are, None where that was not here. images, places, groups: what is known of them from layer 0 on. streams: what
    comes in to the layers of each kind. guidance: (batch, prompt) what another model gave each position. actions: of
    the places of a session, in their order. entered, taken, evicted, scores: for the report, the rows that each layer
    computed, how much each token took of what a layer made that tokens can skip, (batch, q), the layers that lost
    entries, and by what methods ranked tokens.
    peeks: whether a layer is only asked for its queries and keys. handed: the mask of all tokens that the model handed
    to the layer at hand. held: the layers of the cache that hold entries. lent: by layer, what later layers share.
    sliced: whether the model itself goes on with its last tokens only. gathered: masks, by what they were made of.
    home: the device of the token ids. part: bool (batch, q), what stays of a chunk of a prompt, where that was chosen
    before. short: whether the decoder itself is handed what stays, see `short`; inside: whether it runs now.
    """

    def __init__(
        self,
        target: Target,
        cache: Any,
        ids: Tensor,
        arguments: dict[str, Any],
        *,
        brings_images: bool,
        past: int | None = None,
    ) -> None:
        self.target, self.cache, self.ids, self.arguments = target, cache, ids, arguments
        self.home = ids.device
        self.brings_images = brings_images
        self.queries = ids.shape[1]
        if past is None:
            past = 0 if cache is None else cache.layers[target.text_layer].length
        self.past = past
        self._by_number = layers_of(cache) if cache is not None else {}
        self.held = list(self._by_number.values())
        self._layers = frozenset(map(id, self.held))
        # A single new token is never padding, and what earlier masks hid is gone from pruned layers.
        mask, decodes = arguments.get("attention_mask"), self.past and self.queries == 1
        self.mask: Tensor | None = None if mask is None or decodes or bool(mask.all()) else mask.bool()
        self.streams = {"self": Stream(self.queries), "cross": Stream(0)}
        self.encoded: dict[str, list[EncodedImage] | None] = {}
        self.images: list[EncodedImage] = []
        self.places: list[tuple[int, Tensor]] = []
        self.groups: ImageGroups | None = None
        self.guidance: Tensor | None = None
        self.actions: Sequence[Any] = ()
        self.entered: dict[int, Tensor | None] = {}
        self.taken: dict[int, Tensor] = {}
        self.evicted: set[int] = set()
        self.scores: Scores = {}
        self.hooks: list[Any] = []
        self.peeks = False
        self.outer: Forward | None = None
        self.handed: Any = None
        self._says_more = Once()
        self._pending: Tensor | None = None
        self._through: Tensor | None = None
        self._aside: _Aside | None = None
        self._beside = Once()
        self.lent: dict[int, Lent] = {}
        self.sliced = False
        self.part: Tensor | None = None
        self.short = self.inside = False
        self.gathered = Once(most=4)  # masks are large

    def unhook(self) -> None:
        """Take the hooks off the layers."""
        for hook in self.hooks:
            hook.remove()

    def follow(self, device: torch.device) -> None:
        """Go where the hidden states are: a model that is split over devices crosses a border a few times in a pass."""
        if device == self.ids.device:
            return
        self.__dict__.update({name: on(device, held) for name, held in vars(self).items() if name in _FOLLOWS})
        for stream in self.streams.values():
            stream.rows = on(device, stream.rows)
        self._beside.forget()
        self.gathered.forget()
        if self._aside is not None:
            self._aside.beside.forget()

    def owns(self, layer: PrunedLayer) -> bool:
        """Whether `layer` belongs to this forward's cache."""
        return id(layer) in self._layers

    def layer(self, index: int) -> PrunedLayer | None:
        """The cache layer of a decoder layer; None where it holds no entries."""
        return self._by_number.get(self.target.sources[index])

    # -- tokens -----------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows | None:
        """The tokens that the current layer still computes, None while it computes all."""
        return self.streams["self"].rows

    def valid(self) -> Tensor:
        """bool (batch, q): tokens of this forward that are no padding."""
        if self.mask is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return self.mask[:, self.past :]

    @property
    def logical(self) -> tuple[int, int]:
        """Samples, and tokens of each behind this forward, padding and what was dropped included."""
        return self.ids.shape[0], self.past + self.queries

    def last(self) -> Tensor:
        """(batch,) index of each sample's last token in this forward."""
        steps = torch.arange(self.queries, device=self.ids.device)
        return (self.valid() * steps).argmax(-1)

    @cached_property
    def is_image(self) -> Tensor:
        """bool (batch, q): the placeholders of images and videos."""
        return self.target.is_image(self.ids)

    @cached_property
    def text(self) -> Tensor:
        """(batch, t) text tokens after the start of the sample's first image, the last token among them; -1 padded.

        In a pass without images, all text tokens: they come after images of earlier turns.
        """
        looks = ~self.is_image & self.valid()
        if self.brings_images:
            looks &= self.is_image.cumsum(1) > 0
        looks = looks.scatter(1, self.last().unsqueeze(1), True)
        order = looks.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(looks.sum(1).max())]
        return torch.where(looks.gather(1, order), order, -1)

    def visible(self, layer: PrunedLayer | None, keys: int) -> Tensor | None:
        """bool (batch, 1 | kv_heads, keys): slots that hold a token that may be attended to; None when all do."""
        if layer is not None and layer.index is not None:
            filled = on(self.ids.device, layer.filled())  # of another layer, where this one borrows
            if self.mask is not None:
                index = layer.full_index(self.ids.shape[0], self.ids.device).to(self.ids.device)
                # Only text can be masked inside a pruned layer, and even heads have it in the same slots.
                index = index if layer.uneven else index[:, :1]
                mask = self.mask.unsqueeze(1).expand(-1, index.shape[1], -1)
                tokens = mask.gather(2, index.clamp(min=0)) & (index >= 0)
                filled = tokens if filled is None else filled & tokens
            return filled
        if self.rows is not None:
            return self.rows.real.unsqueeze(1) if self.rows.ragged else None
        return None if self.mask is None else self.mask[:, None, self.mask.shape[1] - keys :]

    def says_more(self, mask: Tensor) -> bool:
        """Whether the model's mask of this pass, over all tokens, is not just causal and of no padding."""
        # On each device there is a copy of what the model handed over.
        known = self.handed if isinstance(self.handed, Tensor) else mask
        return self._says_more(lambda: says_more(mask, self.mask, self.past + self.queries), known)

    # -- images -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """In front of layer 0: let the actions choose among the images, if there are any in the prompt."""
        if self.part is not None:
            self._pending = self.part & self.valid()
        elif self.brings_images and self.find_images():
            for action in self.actions:
                action.begin()

    def find_images(self) -> bool:
        """Where the images are; whether there are any in the prompt."""
        if None in self.encoded.values():
            raise UnsupportedError(
                "these image features were not encoded while the model is pruned (precomputed features, or those of a "
                "part of a prompt): pass pixel values with the whole prompt"
            )
        encoded = {medium: images for medium, images in self.encoded.items() if images}
        if not encoded:
            return False
        placeholders = {medium: self.ids.eq(self.target.token_ids[medium]) for medium in encoded}
        counts = {medium: where.sum(1).tolist() for medium, where in placeholders.items()}
        encoded = {medium: repeated(images, counts[medium]) for medium, images in encoded.items()}
        self.images, self.places = place_images(encoded, placeholders)
        if any(image.session is not self.target.session for image in self.images):
            raise UnsupportedError(
                "these image features were encoded under another pruning, whose choice of tokens is not this one's: "
                "encode them again in this block, or pass pixel values"
            )
        self.groups = group_images(self.images, self.places)
        if self.mask is not None:
            self._narrow(self.valid())  # what the mask hides is no candidate, and no budget counts it
        return True

    def image_tokens(self) -> list[list[tuple[Tensor, tuple[Tile, ...]]]]:
        """Per sample the logical positions and tiles of each image."""
        samples: list[list[tuple[Tensor, tuple[Tile, ...]]]] = [[] for _ in range(self.ids.shape[0])]
        for image, (row, positions) in zip(self.images, self.places, strict=True):
            samples[row].append((positions + self.past, image.layout.tiles))
        for action in self.actions:
            for sample, more in zip(samples, action.image_tokens(), strict=False):
                sample.extend(more)
        return samples

    # -- rows -------------------------------------------------------------------------------------------------

    def without(self, chosen: Tensor) -> Tensor:
        """bool (batch, q): what is still computed, but no image token where `chosen` (bool, (groups, n)) is False."""
        groups = self.groups
        assert groups is not None
        gone = torch.zeros(self.ids.shape[0], self.queries + 1, dtype=torch.bool, device=chosen.device)
        # Padding points one past the end.
        gone[groups.row.unsqueeze(1), torch.where(groups.present, groups.positions, self.queries)] = ~chosen
        return self.streams["self"].alive(self.valid()) & ~gone[:, :-1]

    def drop(self, keep: Tensor, stage: bool = False) -> None:
        """Let only the rows where `keep` (bool, (batch, q)) go on, from the next layer.

        stage: of a method with several, whose budgets still count what earlier ones dropped.
        """
        # The last token must go on even if it is an image token: its row becomes the next token.
        keep = keep.scatter(1, self.last().unsqueeze(1), True) & self.valid()
        self._pending = keep
        self._narrow(keep, stage)

    def step_aside(self, through: Tensor) -> None:
        """Let only the rows where `through` (bool, (batch, q)) go through the next layer; the others wait behind it,
        for `rejoin`."""
        self._through = through

    @property
    def waits(self) -> bool:
        """Whether rows wait behind the layer at hand."""
        return self._aside is not None

    def _narrow(self, keep: Tensor, stage: bool = False) -> None:
        """Let methods choose among the image tokens where `keep` (bool, (batch, q)) only."""
        groups = self.groups
        assert groups is not None and groups.centers is not None and groups.cells is not None
        alive = groups.present & keep[groups.row.unsqueeze(1), groups.positions.clamp(min=0)]
        choice = compact(alive.unsqueeze(1), groups.present.unsqueeze(1))
        if choice is not None:
            left, real = choice.source[:, 0], choice.real[:, 0]
            count = real.sum(-1)
            self.groups = dataclasses.replace(
                groups,
                positions=torch.where(real, groups.positions.gather(1, left), -1),
                count=count,
                dropped=groups.dropped + (groups.count - count) if stage else groups.dropped,
                centers=gather_rows(groups.centers, left),
                cells=gather_rows(groups.cells, left),
            )

    def enter(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """In front of a decoder layer: drop what leaves here, and shorten what comes beside the hidden states."""
        self.handed = kwargs.get("attention_mask")
        rows, computed = self.rows, hidden.shape[-2]
        if computed < (self.queries if rows is None else rows.source.shape[1]):
            self._go_on_with_last(computed)
        source = self.leave_out()
        if source is not None:
            hidden = gather_rows(hidden, source)
        if self._through is not None:
            through, self._through = self._through, None
            rows, stream = self.rows, self.streams["self"]
            source = stream.narrow(through, self.valid())
            if source is not None:
                self._aside = _Aside(hidden, source, rows, self.groups, self._beside)
                self._narrow(through)
                hidden, self._beside = gather_rows(hidden, source), Once()
        if self.rows is None:
            return hidden, kwargs
        # Flash attention would read the gaps in the position ids as packed sequences. The mask is of all tokens; the
        # rows' own is made where the kernel is called, and a layer that never asks for its kernel is refused behind it.
        gone = {"position_ids": None} if self.sliced else {"position_ids": None, "attention_mask": None}
        return hidden, {name: self.shortened(name, value) for name, value in kwargs.items() if name not in gone} | gone

    def _go_on_with_last(self, computed: int) -> None:
        """The model itself goes on with its last tokens only, and with what comes beside them."""
        rows = self.rows
        if rows is None:
            every = torch.arange(self.queries, device=self.ids.device).expand(len(self.ids), -1)
            rows = Rows(every, torch.ones_like(every, dtype=torch.bool), False)
        self.streams["self"].rows = Rows(rows.source[:, -computed:], rows.real[:, -computed:], rows.ragged)
        self.sliced = True

    def leave_out(self) -> Tensor | None:
        """Drop what leaves here: (batch, width), which of the rows so far go on; None where all do."""
        if self._pending is None:
            return None
        keep, self._pending = self._pending, None
        source = self.streams["self"].narrow(keep, self.valid())
        if source is not None:
            self._beside = Once()
            self._check_states()
        return source

    def _check_states(self) -> None:
        """Refuse fillers between tokens that a layer carries a state along: it would read them."""
        rows = self.rows
        if rows is None or not (rows.ragged and self.past and "state" in self.target.kinds):
            return
        began = torch.ones_like(rows.real[:, 0]) if self.mask is None else self.mask[:, : self.past].any(1)
        if bool((began & ~rows.real.all(1)).any()):
            raise UnsupportedError(
                "the samples of this batch keep differently many tokens behind others of theirs (a later turn, or a "
                "chunk of a prompt), and this decoder carries a state along that cannot skip the difference: run one "
                "sample at a time"
            )

    def enter_all(self) -> None:
        """Note for the report that every layer gets what is left now."""
        self.entered = dict.fromkeys(range(len(self.target.kinds)), self.streams["self"].index)

    def enter_state(self, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """In front of a layer that carries a state, behind `enter`: its mask is of tokens, and leaves padding out."""
        self.entered[index] = self.streams["self"].index
        if self.rows is None:
            return kwargs
        return {**kwargs, "attention_mask": self.rows.real if self.rows.ragged else None}

    def shortened(self, name: str, value: Any) -> Any:
        """What comes beside the hidden states, for the rows alone where it is of all tokens: position embeddings, and
        inputs that a layer gets of its own, (batch | 1, q, ...); a tuple of these, or anything else as it is."""
        if isinstance(value, tuple):
            return self._beside(lambda: tuple(self.shortened(name, part) for part in value), value)
        rows = self.rows
        assert rows is not None
        # Image features are no tokens of the prompt, even if there are as many.
        fits = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == self.queries
        if not fits or self.sliced or name == "cross_attention_states":
            return value
        value = value.to(rows.source.device)
        flat = value.flatten(2) if value.ndim > 2 else value.unsqueeze(-1)
        return gather_rows(flat, rows.source).view(*rows.source.shape, *value.shape[2:])

    def rejoin(self, hidden: Tensor) -> Tensor:
        """Behind a layer: put what it made, (batch, rows, d), among what waited, which comes back as it was."""
        aside, self._aside = self._aside, None
        if aside is None:
            return hidden
        assert self.rows is not None
        if self.rows.ragged:  # a filler is a copy of a row that waited
            hidden = hidden.where(self.rows.real.unsqueeze(-1), gather_rows(aside.hidden, aside.source))
        self.streams["self"].rows, self.groups, self._beside = aside.rows, aside.groups, aside.beside
        return aside.hidden.scatter(1, aside.source.unsqueeze(-1).expand_as(hidden), hidden)

    def norm(self, hidden: Tensor) -> Tensor:
        """What the model does to hidden states behind its last layer."""
        norm = self.target.norm
        assert norm is not None
        return norm.forward(hidden).to(hidden.device)  # without the hook that ends the pass

    def leave(self, hidden: Tensor) -> Tensor:
        """Behind the last layer: back to the logical length, zeros where rows were dropped."""
        if self.rows is not None and hidden.shape[1] < self.rows.source.shape[1]:
            self._go_on_with_last(hidden.shape[1])
        return self.streams["self"].spread(hidden)
