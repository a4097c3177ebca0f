"""One decoder layer's attention in a pruned forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..methods.tokens import ImageGroups, LayerTokens
from .cache import PrunedLayer
from .forward import Forward
from .masks import gather_mask, of_queries, physical_mask
from .routes import Kernel
from .rows import Lent
from .target import Kind

Output = tuple[Tensor, "Tensor | None"]
Run = Callable[["Attention"], Output]


@dataclass
class Attention:
    """What a layer's attention kernel is about to be called with: physical rows, and the slots that the layer holds.

    query: (batch, heads, rows, d); key, value: (batch, kv_heads, slots, d); mask: what the implementation takes;
    options: the kernel's other arguments.
    """

    forward: Forward
    index: int
    kind: Kind
    kernel: Kernel
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def layer(self) -> PrunedLayer | None:
        """The layer of the cache."""
        return self.forward.layer(self.index)

    @property
    def implementation(self) -> str:
        """Which kernel: "eager", "sdpa" or flash attention."""
        return str(self.module.config._attn_implementation)  # type: ignore[union-attr]

    @property
    def scaling(self) -> float:
        """Of the product of query and key."""
        return self.options.get("scaling") or self.query.shape[-1] ** -0.5

    @cached_property
    def tokens(self) -> LayerTokens:
        """What this layer shows a method; only in a pass that found images."""
        groups = self.forward.groups
        assert groups is not None
        rows = self.forward.streams["self"].rows_of(groups.positions, groups.row)
        return self.tokens_of(groups, torch.where(rows < 0, -1, rows + self.key.shape[2] - self.query.shape[2]))

    def tokens_of(self, groups: ImageGroups, slots: Tensor) -> LayerTokens:
        """What this layer shows a method of these images. slots: (groups, n) the key of each of their tokens, or -1."""
        forward, stream = self.forward, self.forward.streams["self"]
        samples = torch.arange(forward.ids.shape[0], device=forward.ids.device)
        last = stream.rows_of(forward.last(), samples)
        if forward.waits and bool((last < 0).any()):
            raise UnsupportedError(
                f"the prompt ends with an image token that skips layer {self.index}, where a method reads what the "
                "last token looks at: end the prompt with words, or use either method alone"
            )
        visible = forward.visible(self.layer, self.key.shape[2])
        guidance = forward.guidance
        if guidance is not None:
            at = (groups.positions + forward.past).clamp(min=0)
            guidance = guidance[groups.row.unsqueeze(1), at].masked_fill(~groups.present, -torch.inf)
        return LayerTokens(
            groups=groups,
            slots=slots,
            query=self.query,
            key=self.key,
            scaling=self.scaling,
            visible=visible if visible is None else visible[:, 0] if visible.shape[1] == 1 else visible.any(1),
            last=last,
            text=stream.rows_of(forward.text, samples),
            sees=self._sees(),
            softcap=self.options.get("softcap"),
            layer=self.index,
            depth=len(forward.target.kinds),
            guidance=guidance,
            value=self.value,
        )

    # -- masks ------------------------------------------------------------------------------------------------

    @cached_property
    def own(self) -> Tensor | None:
        """(batch | 1, heads | 1, queries, columns) the model's own mask over the tokens of the prompt, where it says
        more than what is causal and no padding; None where it does not."""
        forward, queries = self.forward, self.forward.queries
        mask = self.mask if forward.rows is None else forward.handed
        mask = mask.to(self.query.device) if isinstance(mask, Tensor) else mask
        if self.borrows and mask is None and queries > 1 and "flash" not in self.implementation:
            # Rows and keys left at different layers, so that they are in no order that an implementation knows.
            rows, end = self.query.shape[2] if forward.sliced else queries, forward.past + queries
            causal = torch.ones(1, 1, rows, end, dtype=torch.bool, device=self.query.device)
            return self._as_taken(causal.tril(end - rows))
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            causal = self.options.get("is_causal", getattr(self.module, "is_causal", True))
            if queries == 1 or mask is not None or causal or "flash" in self.implementation:
                return None
            everything = torch.ones(1, 1, queries, forward.past + queries, dtype=torch.bool, device=self.query.device)
            return self._as_taken(everything)
        if queries == 1:  # all that came before, but for a window
            return None if forward.target.windows[self.index] is None else mask
        return mask if self.borrows or forward.says_more(mask) else None

    @property
    def borrows(self) -> bool:
        """Whether the keys are those of an earlier layer."""
        return self.forward.target.sources[self.index] != self.index

    @property
    def lent(self) -> Tensor | None:
        """Of a layer that borrows in a prompt, the position of each key, None where none went."""
        return self.forward.lent[self.forward.target.sources[self.index]].positions

    @property
    def whole(self) -> bool:
        """Whether all tokens are computed and held, and the model's mask is right as it is."""
        forward, layer = self.forward, self.layer
        if self.borrows and forward.queries > 1:
            return self.lent is None and (forward.rows is None or forward.sliced)
        return forward.rows is None and (layer is None or layer.index is None)

    def _as_taken(self, visible: Tensor) -> Tensor:
        """A bool mask as the kernel takes it."""
        if self.implementation == "sdpa":
            return visible
        floor = torch.finfo(self.query.dtype).min
        return torch.zeros(visible.shape, dtype=self.query.dtype, device=visible.device).masked_fill(~visible, floor)

    @cached_property
    def positions(self) -> Tensor:
        """(batch, kv_heads | 1, slots) the logical position of each key, -1 at fillers."""
        forward, layer = self.forward, self.layer
        if self.borrows and forward.queries > 1:
            end = forward.past + forward.queries
            whole = torch.arange(end - self.key.shape[2], end, device=self.key.device)
            return whole.expand(len(forward.ids), 1, -1) if self.lent is None else self.lent
        if layer is not None:
            return layer.full_index(len(forward.ids), self.key.device).to(self.key.device)
        if forward.rows is not None:
            return forward.rows.index.unsqueeze(1)
        return torch.arange(forward.queries, device=self.key.device).expand(len(forward.ids), 1, -1)

    def masked(self, filled: Tensor | None, query: Tensor, key: Tensor, rows: Tensor | None, at: Tensor) -> Any:
        """What the kernel takes for these rows and keys, in order, the last of each aligned.

        filled: bool (batch, 1 | kv_heads, slots), None where all hold a token. rows: (batch, r) which tokens of the
        forward the queries are, None for all. at: (batch, kv_heads | 1, slots) the position of each key, -1 at fillers.
        """
        if self.own is None:
            return physical_mask(self.implementation, query.shape[2], key.shape[2], filled, query.dtype, query)
        own, end = self.own, self.forward.past + self.forward.queries
        # Most layers have the same mask, the same rows and the same entries.
        return self.forward.gathered(lambda: gather_mask(own, rows, at, end, query.shape[1]), own, rows, at)

    def _sees(self) -> Tensor | None:
        """bool (batch, heads | 1, rows, keys): what each row sees, where that is more than what is causal."""
        if self.own is None:
            if self.layer is None or not self.layer.uneven:
                return None
            queries, keys = self.query.shape[2], self.key.shape[2]
            causal = torch.ones(queries, keys, dtype=torch.bool, device=self.key.device).tril(keys - queries)
            return causal & of_queries(self.positions >= 0, self.query.shape[1]).unsqueeze(2)
        rows, mask = self.forward.rows, self.own
        if not self.whole:
            mask = self.masked(None, self.query, self.key, None if rows is None else rows.source, self.positions)
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def over(
        self,
        key: Tensor,
        value: Tensor,
        filled: Tensor | None,
        query: Tensor | None = None,
        rows: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Attention:
        """The same attention over other entries, and of other rows: all in order, and the last of each aligned.

        key, value: (batch, kv_heads, slots, d). filled, rows, at: as `masked` takes them; at: None for the layer's own.
        query: (batch, heads, rows, d), None for all rows.
        """
        query = self.query if query is None else query
        mask = self.masked(filled, query, key, rows, self.positions if at is None else at)
        # Flash attention would read the gaps in the position ids as packed sequences.
        options = {**self.options, "position_ids": None} if "position_ids" in self.options else self.options
        return dataclasses.replace(self, query=query, key=key, value=value, mask=mask, options=options)

    def check_heads(self, method: str) -> None:
        """Refuse a cache that does not hold each head's own keys. method: which chooses by head."""
        assert self.layer is not None and self.layer.keys is not None
        if self.layer.keys.shape[1] != self.key.shape[1]:
            raise UnsupportedError(
                f"this decoder caches one compressed entry for all heads of a layer, and {method} chooses by head: use "
                "a method before or inside the LLM"
            )
        if self.layer.uneven:
            raise UnsupportedError(
                f"the heads of this KV cache keep differently many tokens, and {method} reads the same places in all: "
                "start from a new cache"
            )

    def through(self, actions: Sequence[Any]) -> Output:
        """Run the kernel with the actions (of `places`) that take part wrapped around it, the first outermost."""
        if self.kind == "self":
            forward, rows = self.forward, self.forward.rows
            if forward.queries > 1 and self.index in forward.target.sources[self.index + 1 :]:
                at = None if self.whole else self.positions
                forward.lent[self.index] = Lent(at, forward.streams["self"].index, self.key.shape[2])
            if not self.whole:
                filled = (
                    None if self.borrows and forward.queries > 1 else forward.visible(self.layer, self.key.shape[2])
                )
                source = None if rows is None or forward.sliced else rows.source
                self.mask = self.masked(filled, self.query, self.key, source, self.positions)
        run: Run = Attention.run
        for action in reversed(actions):
            if action.attends(self):
                run = partial(action.attend, run=run)
        return run(self)

    def run(self) -> Output:
        """Run the kernel."""
        forward = self.forward
        forward.entered[self.index] = forward.streams[self.kind].index
        return self.kernel(self.module, self.query, self.key, self.value, self.mask, **self.options)


def unrouted(index: int) -> UnsupportedError:
    """Of a layer that attended without asking transformers for its kernel."""
    return UnsupportedError(
        f"the attention of decoder layer {index} does not ask transformers for its kernel (a patched forward, or a "
        "copy of the module that was pruned), so that nothing can be dropped there: prune the model that runs, with "
        "transformers' own attention"
    )
