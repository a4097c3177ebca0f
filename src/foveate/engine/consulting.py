"""Asking a smaller model: its greedy answer, where it looks meanwhile, and whether its answer can be trusted."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from ..errors import UnsupportedError
from ..layout import ImageLayout
from ..methods.base import GuidedMethod
from ..methods.tokens import ImageGroups, LayerTokens
from .devices import on
from .generation import GenerateCall
from .images import EncodedImage, group_images, place_images
from .report import GuideAnswer
from .routes import add_routes, remove_routes
from .rows import compact, gather_rows
from .target import Target
from .upstream import CACHE_NAMES, without_cache

# The settings of a generation that the guide shares; it is greedy whatever the others say.
_SHARED = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "stop_strings", "eos_token_id",
    "pad_token_id", "bos_token_id", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "watermarking_config",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "remove_invalid_values",
)  # fmt: skip
_DECODER_INPUTS = frozenset({"inputs_embeds", "attention_mask", "position_ids", *CACHE_NAMES})

# A guide may serve several models and threads; its attention has one route at a time.
_turn = threading.RLock()


def device_of(model: Any, ids: Tensor) -> torch.device:
    """Where a model wants its inputs. An offloaded one says "meta", and takes them where the prompt's `ids` are."""
    device: torch.device = model.device
    return ids.device if device.type == "meta" else device


class Guide:
    """A guide and the method that it guides."""

    def __init__(self, target: Target, method: GuidedMethod) -> None:
        self.target, self.method, self.model = target, method, target.model

    @torch.no_grad()
    def consult(self, call: GenerateCall, layouts: Mapping[str, Sequence[ImageLayout]]) -> tuple[GuideAnswer, Tensor]:
        """What the guide says, and what each position of the prompt received meanwhile: (batch, prompt).

        layouts: of the call's images and videos, by medium, as the guide encodes them.
        """
        scores, exits = None, False
        with _turn:
            reading, sequences = self._ask(call, layouts)
            if self.method.exit_threshold is not None:
                scores = self._score(reading, sequences[:, call.ids.shape[1] :])
                exits = bool((scores >= self.method.exit_threshold).all())
        return GuideAnswer(sequences.to(call.ids.device), scores, exits), reading.received

    def _ask(self, call: GenerateCall, layouts: Mapping[str, Sequence[ImageLayout]]) -> tuple[_Reading, Tensor]:
        """What the guide looks at while it answers greedily, and its answer behind the prompt."""
        shared = {name: getattr(call.config, name, None) for name in _SHARED}
        config = GenerationConfig(
            **{name: value for name, value in shared.items() if value is not None},
            do_sample=False, num_beams=1, num_return_sequences=1, use_cache=True, return_dict_in_generate=False,
            output_attentions=False, output_hidden_states=False, output_scores=False, output_logits=False,
        )  # fmt: skip
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.model.generation_config, name))
        inputs = {
            name: self._move(value, call.ids)
            for name, value in without_cache(call.inputs).items()
            if name not in ("mm_encoder_outputs", "logits_to_keep")
        }
        inputs["input_ids"] = ids = self._move(call.ids, call.ids)
        is_image = self.target.is_image(ids)
        images = {medium: [EncodedImage(layout, None) for layout in each] for medium, each in layouts.items()}
        spots = {medium: ids.eq(self.target.token_ids[medium]) for medium in images}
        groups = group_images(*place_images(images, spots))
        reading = _Reading(ids, is_image, groups, config, self.method.exit_threshold is not None)
        attentions = list(self.target.attentions().values())
        hooks: list[Any] = []
        add_routes(dict.fromkeys(attentions, reading.attend))
        try:
            hooks.append(self.model.register_forward_pre_hook(reading.enter, with_kwargs=True))
            hooks.append(self.target.decoder.register_forward_pre_hook(reading.enter_decoder, with_kwargs=True))
            return reading, self.model.generate(**inputs, generation_config=config, logits_processor=[reading])
        finally:
            for hook in hooks:
                hook.remove()
            remove_routes(attentions)

    def _move(self, value: Any, ids: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device_of(self.model, ids), self.model.dtype if value.is_floating_point() else None)

    def _score(self, reading: _Reading, answer: Tensor) -> Tensor:
        """(batch,) how far each answer can be trusted. answer: (batch, t)."""
        assert reading.view is not None and reading.embeds is not None and reading.positions is not None
        groups, length = reading.groups, answer.shape[1]
        at = groups.positions.clamp(min=0)
        guidance = reading.received[groups.row.unsqueeze(1), at].masked_fill(~groups.present, -torch.inf)
        chosen = self.method.probe(dataclasses.replace(on(guidance.device, reading.view), guidance=guidance))
        gone = torch.zeros(len(answer), reading.valid.shape[1] + 1, dtype=torch.bool, device=answer.device)
        # Padding, -1, is the column past the end.
        gone[groups.row.unsqueeze(1), groups.positions] = ~chosen
        keep = reading.valid & ~gone[:, :-1]
        choice = compact(keep.unsqueeze(1), torch.ones_like(keep).unsqueeze(1))
        embeds, positions = reading.embeds, reading.positions.expand(*reading.positions.shape[:-2], len(answer), -1)
        ahead = positions[..., -1:] + torch.arange(1, length + 1, device=answer.device)
        if choice is not None:
            source, keep = choice.source[:, 0], choice.real[:, 0]
            embeds = gather_rows(embeds, source)
            positions = positions.gather(-1, source.expand(*positions.shape[:-2], -1, -1))
        attentions = list(self.target.attentions().values())
        add_routes(dict.fromkeys(attentions, _without_positions))
        try:
            hidden = self.target.decoder(
                inputs_embeds=torch.cat([embeds, self.model.get_input_embeddings()(answer)], dim=1),
                position_ids=torch.cat([positions, ahead], dim=-1),
                attention_mask=torch.cat([keep, torch.ones_like(answer, dtype=torch.bool)], dim=1).long(),
                use_cache=False,
            ).last_hidden_state[:, -length - 1 : -1]
        finally:
            remove_routes(attentions)
        head = self.model.get_output_embeddings()
        # One sample after the other: vocabularies are large.
        checked = torch.stack(
            [
                (said := head(states).float().log_softmax(-1)).gather(-1, tokens.unsqueeze(-1).to(said.device))[:, 0]
                for states, tokens in zip(hidden, answer, strict=True)
            ]
        )
        return self.method.exit_score(torch.stack(reading.sure, dim=1), checked.to(answer.device), reading.real(answer))


def _without_positions(kernel: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    # Flash attention would read the gaps as packed sequences.
    return kernel(module, *args, **{**kwargs, "position_ids": None} if "position_ids" in kwargs else kwargs)


class _Reading(LogitsProcessor):
    """What a guide looks at while it answers: listens to its forwards, and changes nothing.

    received: (batch, prompt) float32, the attention that each position receives from the prompt's text behind its first
    image and from every generated token, summed over layers and heads. sure: a (batch,) log-probability of each
    generated token, where `scores`. embeds, positions: what the decoder got for the prompt.
    """

    def __init__(
        self, ids: Tensor, is_image: Tensor, groups: ImageGroups, config: GenerationConfig, scores: bool
    ) -> None:
        self.thread, self.scores = threading.get_ident(), scores
        self.groups = groups
        self.is_text = (is_image.cumsum(1) > 0) & ~is_image
        self.prompt = ids.shape[1]
        self.received = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        self.valid = torch.ones_like(is_image)
        self.last = ids.new_full((len(ids),), self.prompt - 1)
        self.mask: Tensor | None = None
        self.rows: Tensor | None = None
        self.view: LayerTokens | None = None
        self.embeds: Tensor | None = None
        self.positions: Tensor | None = None
        self.sure: list[Tensor] = []
        eos: int | Sequence[int] | None = config.eos_token_id
        self.eos = ids.new_tensor([] if eos is None else eos).reshape(-1)
        pad = config.pad_token_id
        # Behind an answer that ended, generate() goes on with padding.
        ends = pad is not None and (config.stop_strings or len(self.eos))
        self.ends = torch.cat([self.eos, ids.new_tensor([pad])]) if ends else self.eos
        self.ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def real(self, answer: Tensor) -> Tensor:
        """bool (batch, t): the tokens of an answer up to its end. answer: (batch, t)."""
        end = torch.isin(answer, self.ends)
        return (end.cumsum(1) - end.long() == 0) & (~end | torch.isin(answer, self.eos))

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of the guide: whose answer has ended."""
        if threading.get_ident() == self.thread and self.rows is not None:
            self.ended |= torch.isin(kwargs["input_ids"][:, -1], self.ends)

    def enter_decoder(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In front of the guide's decoder: which tokens read, and which may be read."""
        if threading.get_ident() != self.thread:
            return
        mask = kwargs.get("attention_mask")
        self.mask = None if mask is None else mask.bool()
        if self.rows is not None:
            self.rows = torch.where(self.ended, -1, 0).unsqueeze(1)
            self.last = torch.zeros_like(self.last)
            return
        if self.mask is not None:
            self.valid = self.mask
        self.last = (self.valid * torch.arange(self.prompt, device=self.valid.device)).argmax(-1)
        reads = self.is_text & self.valid
        order = reads.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(reads.sum(1).max())]
        self.rows = torch.where(reads.gather(1, order), order, -1)
        if self.scores:
            more = [
                name
                for name, value in kwargs.items()
                if isinstance(value, (Tensor, list)) and name not in _DECODER_INPUTS
            ]
            if more:
                raise UnsupportedError(
                    f"this guide's decoder also reads {', '.join(more)}, so that its answer cannot be checked on fewer "
                    "image tokens: use exit_threshold=None"
                )
            self.embeds, self.positions = kwargs["inputs_embeds"], kwargs["position_ids"]

    def attend(self, kernel: Any, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Beside one layer's attention: add up what the prompt receives."""
        if threading.get_ident() == self.thread:
            assert self.rows is not None
            # Layers of a guide may be on other devices than its prompt.
            tokens = LayerTokens(
                groups=self.groups,
                slots=self.groups.positions,
                query=query,
                key=key,
                scaling=kwargs.get("scaling") or query.shape[-1] ** -0.5,
                visible=self.mask,
                last=self.last,
                text=self.rows,
            )
            view = on(query.device, tokens)
            self.view = self.view or view
            self.received += view.received(view.text)[..., : self.prompt].sum(1).to(self.received.device)
        return kernel(module, query, key, *args, **kwargs)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores:
            self.sure.append(scores.float().log_softmax(-1).amax(-1))
        return scores
