"""What methods choose from: the image tokens of a prompt, and what encoder and decoder layers know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ATTENTION = frozenset({"received", "given", "cls", "keys"})
"""What methods read of a vision encoder's attention, by the names of `EncoderTokens`."""


@dataclass(frozen=True)
class EncoderTokens:
    """Equally shaped tiles (or whole images) as they leave the vision encoder.

    A method names in `reads` which of the optional tensors it needs; the others are None. Attention is that of
    the last `vision_layers` readable encoder layers, the deepest last, averaged over heads.

    grid: (rows, columns) of the tile; n = rows * columns tokens in raster order.
    received: (tiles, layers, n) attention each patch receives, mean over the patch queries.
    given: (tiles, layers, n) attention each patch gives to the patches, mean over keys.
    cls: (tiles, layers, n) attention that [CLS] pays to each patch; `received` where the encoder has no [CLS].
    keys: (tiles, n, d) keys of the deepest of these layers, mean over heads.
    features: (tiles, n, hidden) the tokens as the LLM will see them.
    states: (tiles, n, width) the same tokens before the projector, and `project` from there to `features`;
        where the projector joins several patches into a token, `features` and the identity.
    levels: (tiles, n, levels, width) each patch behind some encoder layers, those that the method names.
    readers: (tiles, m, width) tokens of the method's own behind the encoder, where they went beside the patches.
    question: (tiles, hidden) what the LLM makes of the text of the tile's prompt, read alone: its last hidden state at
        the last token.
    words: (tiles, m, hidden) the LLM's embeddings of the tokens of that text, zeros behind a shorter one; and `behind`,
        bool (tiles, m), those that stand behind the start of the prompt's first image.
    most: the largest budget among the tiles, for methods that take steps; None where only the device knows it.
    """

    grid: tuple[int, int]
    tiles: int
    device: torch.device
    received: Tensor | None = None
    given: Tensor | None = None
    cls: Tensor | None = None
    keys: Tensor | None = None
    features: Tensor | None = None
    states: Tensor | None = None
    levels: Tensor | None = None
    readers: Tensor | None = None
    question: Tensor | None = None
    words: Tensor | None = None
    behind: Tensor | None = None
    project: Callable[[Tensor], Tensor] = lambda states: states
    most: int | None = None


@dataclass(frozen=True)
class VideoTokens:
    """Clips of equally many, equally shaped frames as they leave the vision encoder; a picture is a clip of one frame.

    The optional tensors are those of `EncoderTokens`, with a dimension for the clips in place of that for the tiles,
    and one for the frames behind it, in their order.

    grid: (rows, columns) of a frame; n = rows * columns tokens in raster order.
    received, given, cls: (clips, frames, layers, n). keys: (clips, frames, n, d).
    features: (clips, frames, n, hidden) the tokens as the LLM will see them. states: (clips, frames, n, width).
    most: the largest budget among the clips; None where only the device knows it.
    """

    grid: tuple[int, int]
    clips: int
    frames: int
    device: torch.device
    received: Tensor | None = None
    given: Tensor | None = None
    cls: Tensor | None = None
    keys: Tensor | None = None
    features: Tensor | None = None
    states: Tensor | None = None
    most: int | None = None

    @property
    def n(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ImageGroups:
    """The image tokens that a decoder method chooses from, one group per image or clip of the batch.

    Tokens that carry structure instead of image content (newline tokens of tiled models) are `pinned`:
    they always stay, are paid from the image's budget, and are not in `positions`.

    positions: (groups, n) index of each token among the tokens of this forward; -1 where a group is shorter
        (at either end).
    row: (groups,) the sample an image belongs to.
    count: (groups,) candidates of the image, i.e. the valid entries of `positions`.
    pinned: (groups,) tokens of the image that always stay.
    dropped: (groups,) tokens that earlier stages of the same method dropped; budgets still count them.
    centers: (groups, n, 2) where each token lies in its picture, (down, right) in [0, 1]; 0 at padding.
    cells: int64 (groups, n, 3) tile, row and column of each token in its picture; 0 at padding.
    frames: (groups,) pictures that the image is of, the frames of a clip; None where every one is of a single picture.
    """

    positions: Tensor
    row: Tensor
    count: Tensor
    pinned: Tensor
    dropped: Tensor | int = 0
    centers: Tensor | None = None
    cells: Tensor | None = None
    frames: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """(groups,) tokens of each image that budgets refer to."""
        return self.count + self.pinned + self.dropped

    @property
    def present(self) -> Tensor:
        """bool (groups, n), False at padding."""
        return self.positions >= 0


@dataclass(frozen=True)
class LayerTokens:
    """What one decoder layer saw of a prompt. Nothing is computed until a method asks for it.

    The layer computed `rows` tokens of each sample; they are the last of the `keys` it attended to. Queries and keys
    are those of the kernel, after RoPE.

    groups: the images. slots: (groups, n) the key of each image token, -1 at padding.
    query: (batch, heads, rows, d). key: (batch, kv_heads, keys, d). scaling: of their product.
    visible: bool (batch, keys), False at padding and fillers, or None where all are tokens.
    last: (batch,) the row of the prompt's last token.
    sees: bool (batch | 1, heads | 1, rows, keys) what each row attends to, where that is no matter of what came before
        it (windows, or images that see themselves both ways); None where it is. softcap: of the logits, in some models.
    text: (batch, t) rows of the text tokens that come after the start of the sample's first image, in order, the last
        token always among them; -1 at padding.
    entered: (batch, rows, hidden) hidden states in front of the layer; left: behind it. Only for layer methods.
    embedded: (batch, rows, hidden) hidden states of the same tokens in front of the first layer, where asked for.
    norm: what the model does to hidden states behind its last layer. Only for layer methods.
    stage: for layer methods, which of their stages this is. layer, depth: which decoder layer, of how many.
    guidance: (groups, n) scores that another model gave, where a method has a guide.
    value: (batch, kv_heads, keys, d) values of the keys; not of a layer that is looked at before it runs.
    """

    groups: ImageGroups
    slots: Tensor
    query: Tensor
    key: Tensor
    scaling: float
    visible: Tensor | None
    last: Tensor
    text: Tensor
    entered: Tensor | None = None
    left: Tensor | None = None
    embedded: Tensor | None = None
    stage: int = 0
    layer: int = 0
    depth: int = 0
    guidance: Tensor | None = None
    norm: Callable[[Tensor], Tensor] = lambda states: states
    sees: Tensor | None = None
    softcap: float | None = None
    value: Tensor | None = None

    @property
    def past(self) -> int:
        """Keys in front of the first row."""
        return self.key.shape[2] - self.query.shape[2]

    def recent(self, window: int) -> Tensor:
        """(batch, r) the last `window` rows up to the prompt's end, in order; -1 before the sample's first token."""
        window = min(window, self.query.shape[2])
        rows = self.last.unsqueeze(1) - torch.arange(window - 1, -1, -1, device=self.last.device)
        real = rows >= 0
        if self.visible is not None:
            real &= self.visible.gather(1, rows.clamp(min=0) + self.past)
        return torch.where(real, rows, -1)

    def last_text(self, count: int | None) -> Tensor:
        """(batch, r) like `text`, the last `count` of each sample only, -1 in front of shorter ones; None for all."""
        if count is None:
            return self.text
        count = min(count, self.text.shape[1])
        place = (self.text >= 0).sum(1, keepdim=True) - torch.arange(count, 0, -1, device=self.text.device)
        return torch.where(place >= 0, self.text.gather(1, place.clamp(min=0)), -1)

    def attention(self, rows: Tensor) -> Tensor:
        """Attention of chosen rows on all keys. rows: (batch, r), -1 gives zeros.

        Returns float32 (batch, heads, r, keys).
        """
        return self._probabilities(rows, self._readable_key) * (rows >= 0)[:, None, :, None]

    @property
    def _readable_key(self) -> Tensor:
        """For products that are quick, and do not overflow: a CPU has few in half precision."""
        return self.key.float() if self.key.device.type == "cpu" else self.key

    def _probabilities(self, rows: Tensor, key: Tensor) -> Tensor:
        """The same, on the first keys, beyond which no row looks; with no meaning at -1."""
        batch, heads, _, dim = self.query.shape
        at, seen = rows.clamp(min=0), key.shape[2]
        picked = self.query.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim))
        grouped = picked.reshape(batch, key.shape[1], -1, dim).to(key.dtype)
        # Scaled first: the bare product can overflow float16.
        logits = ((grouped * self.scaling) @ key.transpose(-1, -2)).float().view(batch, heads, at.shape[1], -1)
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        if self.sees is not None:
            sees = self.sees.expand(batch, -1, -1, -1)[..., :seen]
            hidden = ~sees.gather(2, at[:, None, :, None].expand(-1, sees.shape[1], -1, seen))
        else:
            keys = torch.arange(seen, dtype=torch.float32, device=rows.device)
            hidden = (keys > (at + self.past).unsqueeze(-1)).unsqueeze(1)
        if self.visible is not None:
            hidden = hidden | ~self.visible[:, None, None, :seen]
        return logits.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)

    def received(self, rows: Tensor, weights: Tensor | None = None, chunk_elements: int | None = None) -> Tensor:
        """What every key receives from chosen rows: the sum of their attention, worked out in chunks.

        rows: (batch, r), -1 counts nothing. weights: (batch, r), or (batch, r, sums) for several sums of the same rows,
        or None for ones. chunk_elements: of attention at once; None for what suits the device. Returns (batch, heads,
        keys), or (batch, heads, sums, keys).
        """
        batch, heads = self.query.shape[:2]
        several = weights is not None and weights.ndim == 3
        share = (rows >= 0).float().unsqueeze(-1)
        if weights is not None:
            share = share * (weights if several else weights.unsqueeze(-1))
        on_cpu = rows.device.type == "cpu"
        # There chunks that stay in its cache are quicker.
        chunk_elements = chunk_elements or (1 << 20 if on_cpu else 1 << 24)
        key = self._readable_key
        step = max(1, chunk_elements // (batch * heads * key.shape[2]))
        total = torch.zeros(batch, heads, share.shape[2], key.shape[2], dtype=torch.float32, device=rows.device)
        for start in range(0, rows.shape[1], step):
            part = rows[:, start : start + step]
            # No row looks behind itself, and asking where the last of them is costs nothing there.
            seen = int(part.max()) + self.past + 1 if on_cpu and self.sees is None else key.shape[2]
            looks = self._probabilities(part, key[:, :, : max(seen, 1)])
            total[..., : max(seen, 1)] += share[:, start : start + step].transpose(1, 2).unsqueeze(1) @ looks
        return total if several else total[:, :, 0]

    def received_from_all(self, count: int | None = None) -> Tensor:
        """What every key receives from all rows of the prompt: (batch, heads, keys).

        count: how many rows are read and stand for all, at an even stride and the last among them; None for all.
        """
        rows = self.recent(self.query.shape[2])
        if count is None:
            return self.received(rows)
        rows, share = thinned(rows, count)
        return self.received(rows, share.expand(rows.shape))

    def mean_attention(self, rows: Tensor) -> Tensor:
        """Attention of chosen rows on every key, mean over the rows of a sample. rows: (batch, r), -1 counts nothing.

        Returns (batch, heads, keys).
        """
        return self.received(rows) / (rows >= 0).sum(1).clamp(min=1)[:, None, None]

    def keys_of(self, rows: Tensor) -> Tensor:
        """bool (batch, keys): the keys of chosen rows. rows: (batch, r), -1 has none."""
        keys = self.key.shape[2]
        mask = torch.zeros(len(rows), keys + 1, dtype=torch.bool, device=rows.device)
        return mask.scatter(1, torch.where(rows < 0, keys, rows + self.past), True)[:, :-1]

    def image_mask(self) -> Tensor:
        """bool (batch, keys): the keys of image tokens."""
        keys = self.key.shape[2]
        mask = torch.zeros(len(self.last), keys + 1, dtype=torch.bool, device=self.slots.device)
        # Padding points one past the end.
        mask[self.groups.row.unsqueeze(1), torch.where(self.slots < 0, keys, self.slots)] = True
        return mask[:, :-1]

    def of_images(self, scores: Tensor) -> Tensor:
        """Pick the image tokens: (batch, *, keys) -> (groups, *, n), -inf at padding."""
        at = self.slots.clamp(min=0).view(len(self.slots), *[1] * (scores.ndim - 2), -1)
        of_rows = scores[self.groups.row]
        picked = of_rows.gather(-1, at.expand(*of_rows.shape[:-1], -1))
        return picked.masked_fill((self.slots < 0).view(at.shape), -torch.inf)

    def last_attention(self) -> Tensor:
        """Attention of the prompt's last token on the images: (groups, heads, n), -inf at padding."""
        return self.of_images(self.attention(self.last.unsqueeze(1))[:, :, 0])

    def per_kv_head(self, scores: Tensor) -> Tensor:
        """Mean over the query heads that share a KV head: (groups, heads, *) -> (groups, kv_heads, *)."""
        return scores.unflatten(1, (self.key.shape[1], -1)).mean(2)

    def image_keys(self) -> Tensor:
        """(groups, kv_heads, n, d) keys of the image tokens; what stands at padding has no meaning."""
        return self._at_slots(self.key)

    def image_values(self) -> Tensor:
        """(groups, kv_heads, n, d) values of the image tokens; what stands at padding has no meaning."""
        assert self.value is not None
        return self._at_slots(self.value)

    def _at_slots(self, held: Tensor) -> Tensor:
        at = self.slots.clamp(min=0)[:, None, :, None]
        return held[self.groups.row].gather(2, at.expand(-1, held.shape[1], -1, held.shape[3]))

    def image_rows(self, states: Tensor) -> Tensor:
        """Pick the image tokens of hidden states: (batch, rows, d) -> (groups, n, d)."""
        at = (self.slots - self.past).clamp(min=0).unsqueeze(-1)
        return states[self.groups.row].gather(1, at.expand(-1, -1, states.shape[-1]))

    def text_rows(self, states: Tensor) -> Tensor:
        """Pick the text tokens of hidden states: (batch, rows, d) -> (batch, t, d)."""
        return states.gather(1, self.text.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def thinned(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` of each sample's rows at an even stride, the last among them, and how many each stands for.

    rows: (batch, r) ascending, -1 in front. Returns (batch, min(count, r)), ascending, -1 in front; and (batch, 1).
    """
    have = (rows >= 0).sum(1, keepdim=True)
    some = have.clamp(max=count)
    back = torch.arange(min(count, rows.shape[1]) - 1, -1, -1, device=rows.device)
    place = rows.shape[1] - 1 - back * have // some.clamp(min=1)
    picked = torch.where(back < some, rows.gather(1, place.clamp(min=0)), -1)
    return picked, have / some.clamp(min=1)
