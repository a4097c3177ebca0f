"""The bases of all methods, one for each place where image tokens can be dropped."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

# All of them, also those that nothing here needs: methods of other packages import them from here.
from .budgets import check_keep, check_range, floor_budget, scaled_layers, token_budget, topk_mask  # noqa: F401
from .method import CONFIG_NAME, Method, Place, read_config  # noqa: F401
from .stepwise import DecodeMethod  # noqa: F401
from .tokens import EncoderTokens, ImageGroups, LayerTokens, VideoTokens


@dataclass
class EncoderMethod(Method):
    """Chooses tokens between the vision encoder and the LLM; the LLM never sees the others.

    reads: names of the optional tensors of `EncoderTokens` that `select` and `merge` need.
    """

    place: ClassVar[Place] = "encoder"
    reads: ClassVar[frozenset[str]] = frozenset()

    @property
    def vision_layers(self) -> int:
        """How many encoder layers are read, the penultimate one and those before it (fewer where there are fewer)."""
        return 1

    @property
    def fills_budget(self) -> bool:
        """Whether it keeps as many tokens of a picture as it may, so that their number is known in advance."""
        return True

    @property
    def only_drops(self) -> bool:
        return type(self).merge is EncoderMethod.merge

    def levels(self, depth: int) -> tuple[int, ...]:
        """For `EncoderTokens.levels`: behind which encoder layers patches are read, each in [1, depth].

        depth: encoder layers up to the one whose output the features are made of.
        """
        return ()

    @property
    def seeds(self) -> Tensor | None:
        """For `EncoderTokens.readers`: tokens of the method's own, (m, width), that go through the encoder beside the
        patches and read them and each other, while the patches do not see them."""
        return None

    def score(self, tokens: Any) -> Tensor | None:
        """By what `select` ranks tokens, the larger the likelier one stays: float (tiles, n); None, the default, where
        it ranks by no number. For those who look on: `foveate show` draws it.

        tokens: as `select` has them; of a `VideoMethod` as `choose` has them, for float (clips, frames, n).
        """
        return None

    def mass(self, tokens: EncoderTokens) -> Tensor:
        """What each token counts where an image keeps a share of the whole (`mass.by_mass`): (tiles, n)."""
        raise NotImplementedError  # asked only of methods whose scores add up, which say it

    @abstractmethod
    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        """Which tokens stay.

        tokens: equally shaped tiles. budget: (tiles,) tokens that each may keep. Returns bool (tiles, n).
        """

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        """What the tokens become: (tiles, n, hidden), read where `keep` is True; None where they stay what they are.

        keep: bool (tiles, n), what `select` returned.
        """
        return None


@dataclass
class VideoMethod(EncoderMethod):
    """Chooses tokens between the vision encoder and the LLM by looking at all frames of a clip together.

    merges: whether `choose` changes what tokens are. A still picture is a clip of one frame.
    """

    merges: ClassVar[bool] = False

    @property
    def only_drops(self) -> bool:
        return not self.merges

    @abstractmethod
    def choose(self, tokens: VideoTokens, budget: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which tokens stay, bool (clips, frames, n), and what they become, (clips, frames, n, hidden), read where they
        stay; None for what they are.

        tokens: equally shaped clips. budget: (clips,) tokens that each may keep, all its frames together.
        """

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        return self.choose(_stills(tokens), budget)[0][:, 0]

    def merge(self, tokens: EncoderTokens, keep: Tensor) -> Tensor | None:
        becomes = self.choose(_stills(tokens), keep.sum(-1))[1]
        return None if becomes is None else becomes[:, 0]


def _stills(tokens: EncoderTokens) -> VideoTokens:
    """Each tile as a clip of one frame."""
    read = {name: getattr(tokens, name) for name in ("received", "given", "cls", "keys", "features", "states")}
    frames = {name: None if value is None else value.unsqueeze(1) for name, value in read.items()}
    return VideoTokens(tokens.grid, tokens.tiles, 1, tokens.device, most=tokens.most, **frames)


@dataclass
class LayerMethod(Method):
    """Drops image tokens inside the LLM, in one or several stages.

    uses_embeddings: whether `select` reads `LayerTokens.embedded`.
    looks_ahead: whether `select` gets the queries and keys of the first layer without the dropped tokens, which is
        about to run, instead of those of the layer in front of it. They cost that layer's projections once more.
    """

    place: ClassVar[Place] = "layer"
    uses_embeddings: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    @property
    def only_drops(self) -> bool:
        return type(self).merge is LayerMethod.merge

    @abstractmethod
    def stages(self, depth: int) -> tuple[int, ...]:
        """The first layer without the dropped tokens of each stage, ascending, each in [1, depth - 1].

        depth: decoder layers of the model.
        """

    def score(self, tokens: LayerTokens) -> Tensor | None:
        """By what `select` ranks tokens, the larger the likelier one goes on: float (groups, n), without meaning at
        padding; None, the default, where it ranks by no number. For those who look on."""
        return None

    @abstractmethod
    def select(self, tokens: LayerTokens) -> Tensor:
        """Which tokens go on. Returns bool (groups, n).

        tokens: of the layer in front of the stage, or where the method `looks_ahead`, of the first layer behind it.
        """

    def merge(self, tokens: LayerTokens, keep: Tensor) -> Tensor | None:
        """Hidden states the tokens go on with: (groups, n, hidden), read where `keep` is True; None for their own."""
        return None


@dataclass
class DepthMethod(Method):
    """Lets only some image tokens go through certain decoder layers; the others skip such a layer and come back as they
    were. A routed layer holds keys and values of what went through it, and of the text, alone.

    `keep` is what goes through a routed layer.
    """

    place: ClassVar[Place] = "depth"

    @property
    def only_drops(self) -> bool:
        return False

    @abstractmethod
    def routed(self, depth: int) -> tuple[int, ...]:
        """The routed layers, ascending, each in [0, depth - 1]. depth: decoder layers of the model."""

    def score(self, states: Tensor, groups: ImageGroups, layer: int) -> Tensor | None:
        """By what `select` ranks tokens, the larger the likelier one goes through: float (groups, n), without meaning
        at padding; None, the default, where it ranks by no number. For those who look on."""
        return None

    @abstractmethod
    def select(self, states: Tensor, groups: ImageGroups, layer: int) -> tuple[Tensor, Tensor | None]:
        """Which tokens go through a layer, and how much of what it adds to them they take.

        states: (groups, n, hidden) in front of the layer, without meaning at padding. layer: which one.
        Returns bool (groups, n), and a weight (groups, n): a token h leaves the layer as h + weight * (layer(h) - h);
        None for 1 everywhere.
        """


@dataclass
class GuidedMethod(LayerMethod):
    """Drops the image tokens that another, smaller model cares least about: `LayerTokens.guidance` says how much.

    The guide answers first, greedily, so the method works in `generate()` only.

    guide: the smaller model, of the same family, with the same tokenizer and as many tokens for every image. It is no
        part of `to_dict()`.
    exit_threshold: the score of an answer (see `exit_score`) from which on the guide's answer is the answer, and the
        large model is not asked; None to ask it always.
    """

    guide: Any = field(default=None, repr=False, compare=False)
    exit_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide is None:
            raise ValueError(
                f"{self.name} needs a guide, a smaller model of the same family: foveate.{type(self).__name__}"
                "(guide=small_model). A saved configuration holds none: give it one with "
                "foveate.Method.from_dict({**config, 'guide': small_model})"
            )
        if self.exit_threshold is not None:
            check_range("exit_threshold", self.exit_threshold, 0, 1)

    @property
    def keeps_all(self) -> bool:
        """Whether the large model runs as it is, and always."""
        return super().keeps_all and self.exit_threshold is None

    @property
    def only_drops(self) -> bool:
        return super().only_drops and self.exit_threshold is None

    def to_dict(self) -> dict[str, Any]:
        """The method's name and options but the guide, JSON-safe."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "guide"}
        return {"method": self.name, **options}

    @abstractmethod
    def probe(self, tokens: LayerTokens) -> Tensor:
        """Which image tokens the guide itself is left with when its answer is checked: bool (groups, n)."""

    @abstractmethod
    def exit_score(self, sure: Tensor, checked: Tensor, real: Tensor) -> Tensor:
        """(batch,) how far the guide's answers can be trusted, in [0, 1].

        sure: (batch, t) log-probability that the guide gave each token of its answer; checked: the same with the image
        tokens of `probe` alone. real: bool (batch, t), False behind an answer's end.
        """


@dataclass
class ContrastMethod(LayerMethod):
    """Changes what the model says next by comparing it with itself on fewer image tokens, at every step.

    The model of `generate()` drops nothing; the stages are those of a second run beside it, which sees the same tokens.
    """

    place: ClassVar[Place] = "logits"

    @property
    def only_drops(self) -> bool:
        return False

    @abstractmethod
    def contrast(self, full: Tensor, reduced: Tensor) -> Tensor:
        """Log-probabilities of the next token, from the two runs' logits. All float32 (rows, vocabulary)."""


@dataclass
class CacheMethod(Method):
    """Evicts image tokens from the KV cache of each layer once the layer's prefill attention is done.

    sparse_attention: choose before the layer attends, and let only what stays attend and be attended to.
    uneven_heads: whether heads of a layer may keep differently many tokens of an image. The layer then holds as many
        slots as its widest head needs, and flash attention is refused.
    """

    place: ClassVar[Place] = "cache"
    sparse_attention: ClassVar[bool] = False
    uneven_heads: ClassVar[bool] = False

    @property
    def needs_all_layers(self) -> bool:
        """Whether the budgets compare layers, so that eviction waits until the last layer has attended."""
        return False

    @property
    def decode_distance(self) -> int | None:
        """Evict while decoding, too: after each step the entry this many slots before the end of the kept prompt."""
        return None

    @property
    def only_drops(self) -> bool:
        plain = self.decode_distance is None and not self.sparse_attention
        return plain and type(self).merge is CacheMethod.merge

    def first_layer(self) -> int:
        """Layers before this one keep everything."""
        return 0

    def score(self, tokens: LayerTokens) -> Tensor:
        """How much each entry of one layer matters: (groups, kv_heads | 1, ..., n), -inf at padding.

        By default the attention of the last prompt token, mean over the query heads that share a KV head.
        """
        return tokens.per_kv_head(tokens.last_attention())

    def mass(self, scores: Tensor) -> Tensor:
        """What each entry counts where an image keeps a share of the whole (`mass.by_mass`): (groups, n), negative at
        padding alone. scores: what `score` returned."""
        raise NotImplementedError  # asked only of methods whose scores add up, which say it

    def statistics(self, scores: Tensor, groups: ImageGroups) -> Tensor:
        """What the budgets need to know of one layer: (statistics, groups). scores: what `score` returned."""
        return groups.count.new_zeros(0, len(groups.count))

    def budgets(self, statistics: Tensor, groups: ImageGroups) -> Tensor:
        """(layers, groups) tokens of each image that each layer keeps in every head; (layers, groups, kv_heads | 1)
        where heads differ.

        statistics: (layers, statistics, groups), of all layers where `needs_all_layers`, else of one.
        """
        return floor_budget(self.share(groups), groups).expand(len(statistics), -1)

    def budget(self, scores: Tensor, tokens: LayerTokens) -> Tensor:
        """The same of one layer, where budgets do not compare layers: (groups,), or (groups, kv_heads | 1).

        scores: what `score` returned.
        """
        return self.budgets(self.statistics(scores, tokens.groups).unsqueeze(0), tokens.groups)[0]

    def select(self, scores: Tensor, budget: Tensor) -> Tensor:
        """Which entries of one layer stay: bool (groups, kv_heads | 1, n).

        scores: what `score` returned. budget: (groups,), or (groups, kv_heads | 1). By default the top `budget` of each
        head. Heads keep equally many, unless the class says `uneven_heads`.
        """
        return topk_mask(scores, budget.view(len(budget), -1).expand(scores.shape[:-1]))

    def merge(self, keep: Tensor, groups: ImageGroups) -> Tensor | None:
        """Where dropped entries go: (groups, kv_heads | 1, n), for each the index (in [0, n)) of the kept entry of the
        same image whose keys and values become the mean over all that go there, itself included; None to drop.

        keep: bool, what `select` returned.
        """
        return None


@dataclass
class CrossMethod(Method):
    """Trims the image features that cross-attention layers read, after the first of them has attended."""

    place: ClassVar[Place] = "cross"

    def budget(self, valid: Tensor, images: Tensor) -> Tensor:
        """(batch,) features that `keep` asks for; valid, images: as `select` takes them."""
        features = valid.sum(-1)
        if isinstance(self.keep, int):
            return torch.minimum(min(self.keep, 1 << 32) * images, features)  # any int, but no overflow
        return (self.keep * features + 1e-4).floor().long().clamp(min=1)

    def score(self, attention: Tensor, valid: Tensor) -> Tensor | None:
        """By what `select` ranks features, the larger the likelier one stays: float (batch, n) or (batch, heads, n);
        None, the default, where it ranks by no number. For those who look on. attention, valid: as `select` has them.
        """
        return None

    @abstractmethod
    def select(self, attention: Tensor, valid: Tensor, images: Tensor) -> Tensor:
        """Which features stay.

        attention: (batch, heads, n) attention that each feature receives, summed over the text rows.
        valid: bool (batch, n), False for padded tiles. images: (batch,) pictures of each sample.
        Returns bool (batch, n), True only where `valid`.
        """
