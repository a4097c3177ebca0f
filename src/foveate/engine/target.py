"""The model that is pruned, and where its parts are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..families.base import Family, ImageLayout
from ..methods.host import Encoder, Host
from .clips import Clips, of_samples
from .devices import on
from .upstream import STATE_LAYERS, DynamicCache, cache_name

Kind = Literal["self", "cross", "state"]


@dataclass(frozen=True)
class Target:
    """A model of a known family.

    model: the one with `generate()`. base: the module whose forward receives token ids and pixels. decoder: the
    language model inside it. session: a mark of this very pruning, for what leaves it. clips: which of the pictures to
    come are frames of clips. said: what else the user says of the images at hand.
    """

    model: Any
    family: Family
    base: Any
    decoder: Any
    session: object = field(default_factory=object)
    clips: Clips = field(default_factory=Clips)
    said: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> list[Kind]:
        """What each decoder layer attends to: the prompt ("self") or image features ("cross"); or "state", where it
        attends to nothing and carries a state along (linear attention, convolutions)."""
        held = dict(enumerate(DynamicCache(config=self.decoder.config).layers))
        return [
            "cross"
            if hasattr(layer, self.family.cross_attention)
            else "state"
            if type(held.get(index)) in STATE_LAYERS
            else "self"
            for index, layer in enumerate(self.decoder.layers)
        ]

    @cached_property
    def windows(self) -> list[int | None]:
        """How far back each decoder layer sees, None for all the way: what transformers' own cache makes of it."""
        layers = DynamicCache(config=self.decoder.config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        return [windows[source] if source < len(windows) else None for source in self.sources]

    @cached_property
    def sources(self) -> list[int]:
        """The layer whose keys and values each decoder layer attends to: itself, or an earlier one."""
        config, depth = self.decoder.config, len(self.kinds)
        own = depth - (getattr(config, "num_kv_shared_layers", None) or 0)
        types = getattr(config, "layer_types", None) or [""] * depth
        return [i if i < own else max(j for j in range(own) if types[j] == types[i]) for i in range(depth)]

    @cached_property
    def readable(self) -> list[bool]:
        """Which layers show a method how the prompt looks at all of its image tokens, with keys of their own."""
        layers = enumerate(zip(self.kinds, self.windows, self.sources, strict=True))
        return [kind == "self" and window is None and source == i for i, (kind, window, source) in layers]

    def check_readable(self, method: str, layers: Sequence[int]) -> None:
        """Refuse a method that reads or evicts what none of these layers has.

        Raises:
            UnsupportedError: where none of them shows a prompt's images as a whole.
        """
        if not any(self.readable[layer] for layer in layers):
            seen = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])
            raise UnsupportedError(
                f"{method} needs a decoder layer that attends to the whole prompt, and layers {seen} of this "
                f"{self.decoder.config.model_type} decoder do not: use a method that acts before the LLM"
            )

    @property
    def crosses(self) -> bool:
        """Whether images reach the decoder through cross-attention layers."""
        return "cross" in self.kinds

    @cached_property
    def text_layer(self) -> int:
        """The first layer that attends to the prompt."""
        return self.kinds.index("self")

    @cached_property
    def image_token_id(self) -> int:
        """The id of the image placeholder; -1 where images are no part of the prompt."""
        return -1 if self.crosses else self.family.image_token_id(self.base.config)

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The placeholder of each medium that can be pruned, "image" or "video"."""
        video = self.family.video_token_id(self.base.config)
        return {"image": self.image_token_id} | ({} if video is None else {"video": video})

    def layouts(self, medium: str, inputs: dict[str, Any]) -> list[ImageLayout]:
        """Of the images or videos among a model's inputs, in order."""
        lay_out = self.family.video_layouts if medium == "video" else self.family.layouts
        return lay_out(self.base.config, inputs)

    def joined(self, medium: str, each: Sequence[ImageLayout], prompt: Callable[[], Tensor]) -> list[ImageLayout]:
        """Frames that come as pictures, or as videos of their own, as the clips that they form.

        Those are as the user says; without a word pictures are pictures, and the frames of a sample a clip as long as
        their shape is one. each: as `layouts` gives them. prompt: gives the ids (batch, q) they stand in.
        """
        apart, said = self.family.frames_apart and "video" in self.token_ids, self.clips.frames is not None
        if medium == "video":
            if not apart:
                return list(each)
            return self.clips.joined(each) if said else of_samples(each, self._videos(prompt()).sum(1).tolist())
        # What is said is of the frames of videos, where some come.
        return list(each) if apart and said and bool(self._videos(prompt()).any()) else self.clips.joined(each)

    def _videos(self, ids: Tensor) -> Tensor:
        return ids.eq(self.token_ids["video"])

    def is_image(self, ids: Tensor) -> Tensor:
        """Where the placeholders of images and videos are: bool like `ids`."""
        images = ids.eq(self.image_token_id)
        return images | self._videos(ids) if "video" in self.token_ids else images

    @cached_property
    def cache_name(self) -> str:
        """The name under which the base model takes its KV cache."""
        return cache_name(self.base.forward)

    @property
    def norm(self) -> nn.Module | None:
        """The module behind the last decoder layer; None where it has none of the usual names."""
        found = (getattr(self.decoder, name, None) for name in ("norm", "final_layernorm", "embedding_norm"))
        return next((module for module in found if module is not None), None)

    def attention(self, index: int) -> nn.Module | None:
        """The attention module of a decoder layer; None where there is none of the family's name."""
        layer, kind = self.decoder.layers[index], self.kinds[index]
        return getattr(layer, getattr(self.family, f"{kind}_attention"), None)

    def attentions(self) -> dict[int, nn.Module]:
        """The attention modules of the decoder layers that attend to anything."""
        attending = (index for index, kind in enumerate(self.kinds) if kind != "state")
        return {index: self.attention(index) for index in attending}  # type: ignore[misc]

    @property
    def host(self) -> Host:
        """What a method may ask of the model."""
        hidden = self.base.get_input_embeddings().weight.shape[-1]
        device = self.base.get_input_embeddings().weight.device
        return Host(
            self.family.model_type,
            len(self.kinds),
            hidden,
            device,
            lambda: fingerprint(self.base),
            self._projector,
            self._encoder(),
            self.decoder.config.num_attention_heads,
            tuple(layer for layer, reads in enumerate(self.readable) if reads),
        )

    def _encoder(self) -> Encoder | None:
        if "encoder" not in self.family.places or not self.family.shows_attention:
            return None
        config = self.base.config
        layers = self.family.encoder_layers(self.base)
        return Encoder(len(layers), self.family.width(config), self.family.side(config))

    def _projector(self) -> dict[str, torch.Tensor]:
        module = self.family.projector(self.base)
        weights = {} if module is None else dict(module.named_parameters())
        return {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}


def fingerprint(base: nn.Module) -> str:
    """A mark of a model's weights: the same in every dtype, another one wherever it was trained further.

    Made of which of the first numbers of every matrix are positive; the smallest, which half precision may round to 0,
    count as not.
    """
    heads = [parameter.detach().flatten()[:64].float() for parameter in base.parameters() if parameter.ndim > 1]
    if any(head.is_meta for head in heads):
        raise UnsupportedError(
            "methods with weights of their own and certificates recognise a model by its weights, and some of these "
            "are offloaded: load the model with all weights on devices, or use a method without weights or certificate"
        )
    signs = (torch.cat(on(heads[0].device, heads)) > 1e-6).cpu().split([len(head) for head in heads])
    # Sorted: which matrix comes first differs between releases of transformers.
    marks = sorted(bytes(part.tolist()) for part in signs)
    return hashlib.sha256(b"|".join(marks)).hexdigest()[:32]
