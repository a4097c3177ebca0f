"""The front end: a processor that writes fewer placeholders into prompts."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing.processor import PromptUpdateDetails, UpdateMode

from ..layout import ImageLayout
from ..methods.base import EncoderMethod, token_budget
from .metrics import count_tokens
from .plan import Plan
from .settings import Settings, uses_m_rope

Processor: Any = Any if TYPE_CHECKING else object

PLAN = "foveate_plan"
"""The name of a picture's plan among what the processor makes of it."""


REMEMBERED = 1 << 16
"""Pictures of which it is known how many positions they take, while they are cached."""


class _Request(NamedTuple):
    """What is processed: with which method, and how many tokens the prompt has before placeholders are written."""

    method: EncoderMethod
    prompt: int


# Threads share a processor.
_request: contextvars.ContextVar[_Request] = contextvars.ContextVar("foveate_request")
_keep_of_dummies: contextvars.ContextVar[float | int | None] = contextvars.ContextVar("foveate_dummies", default=None)


class PrunedDetails(PromptUpdateDetails):
    """The placeholders of a pruned picture.

    longer: how many positions it adds to the unpruned prompt. before, after: its tokens.
    """

    longer = before = after = 0


class PrunedProcessor(Processor):
    """Stands in front of the processor of any model, and overrides what vLLM's base class does."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._config = info.get_hf_config()
        self._settings = Settings.parse(self._config.foveate)
        self._m_rope = uses_m_rope(info.ctx.model_config)
        self._family = self._settings.check_model(self._config, self._m_rope)
        self._longer: dict[str, int] = {}  # of pictures in vLLM's cache, by hash

    # -- requests

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request, with the method that it asks for. ValueError for what is refused, HTTP 400 in a server."""
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        asked = kwargs.pop("foveate", None)  # no processor of transformers may see it
        if asked is not None and inputs.mm_data_items.get_all_counts().get("video"):
            raise ValueError(
                'films are served as vLLM serves them, unpruned: leave mm_processor_kwargs["foveate"] out of requests '
                "with films"
            )
        keep, last = _keep_of_dummies.get(), inputs.prompt[-1:]
        if keep is None and self._m_rope and last == [self._family.image_token_id(self._config)]:
            raise ValueError("the prompt ends with a picture, whose last positions are not known: put text behind it")
        method = self._settings.of_request(asked)
        method = method if keep is None else replace(method, keep=keep)
        token = _request.set(_Request(method, len(inputs.prompt)))
        try:
            return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        finally:
            _request.reset(token)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # Of the caches of processed pictures, of encoded ones and of prompts, and of stores that servers share.
        mark = {**_request.get().method.to_dict(), **self._settings.mark}
        kwargs = {**inputs.hf_processor_mm_kwargs, "foveate": mark}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not updates.get("image"):  # there are none, or all of them are cached
            return updates
        pairs = zip(updates["image"], out_mm_kwargs["image"], strict=True)
        return {**updates, "image": [self._pruned(of_picture, item) for of_picture, item in pairs]}

    def _pruned(self, updates: Sequence[Any], item: Any) -> list[Any]:
        """What is to be written into the prompt for one picture. item: what the processor made of it."""
        data = item.get_data()
        if any("embeds" in name for name in data):  # encoded elsewhere
            return list(updates)
        shorter = []
        for update in updates:
            plan = self._plan(update.content, data)
            item[PLAN] = MultiModalFieldElem(data=plan.tensor(), field=MultiModalBatchedField(keep_on_cpu=True))
            embeds = None if plan.woven else update.content.is_embed
            details = PrunedDetails(full=plan.placeholders.tolist(), is_embed=embeds)
            replaced = (
                len(update.target) if update.mode == UpdateMode.REPLACE and isinstance(update.target, list) else 0
            )
            details.longer = self._positions(plan) - replaced
            details.before, details.after = plan.layout.tokens, plan.kept
            shorter.append(replace(update, content=details))
        return shorter

    def _plan(self, content: Any, data: Mapping[str, Any]) -> Plan:
        full = torch.tensor(content.full)
        embeds = torch.ones(len(full), dtype=torch.bool) if content.is_embed is None else content.is_embed(content.full)
        one = {name: value[None].cpu() for name, value in data.items() if isinstance(value, Tensor)}
        (layout,) = self._family.layouts(self._config, {**one, "input_ids": full[None]})
        keep = _request.get().method.keep
        self._settings.check_range(layout, keep)
        pixels = next(value for name, value in data.items() if name.startswith("pixel_values"))
        plan = Plan(layout, self._patches(layout, pixels), token_budget(keep, layout.tokens), full, embeds.bool())
        plan.check(self._config.model_type, self._m_rope)
        return plan

    def _patches(self, layout: ImageLayout, pixels: Tensor) -> int:
        """How many patches the encoder makes of one picture. pixels: of squares (3, h, w) or (tiles, 3, h, w)."""
        side = self._family.side(self._config)
        if side is None:
            return sum(tile.patches.numel() for tile in layout.tiles)
        return side**2 * (1 if pixels.ndim == 3 else len(pixels))

    def _positions(self, plan: Plan) -> int:
        """How many positions an unpruned picture takes."""
        if self._m_rope:
            return len(plan.full) - plan.layout.tokens + int(plan.layout.cells[:, 1:].max()) + 1
        return len(plan.full)

    # -- prompts that would be too long

    def _merge_mm_kwargs(
        self, cache: Any, mm_hashes: Any, mm_is_cached: Any, mm_missing_kwargs: Any, mm_missing_prompt_updates: Any
    ) -> Any:
        # Refused later, pictures would stay in this cache without having reached the engine's.
        hashes, cached = mm_hashes.get("image", []), mm_is_cached.get("image", [])
        missing = (mark for mark, there in zip(hashes, cached, strict=True) if not there)
        new = dict(zip(missing, map(_longer, mm_missing_prompt_updates.get("image", [])), strict=False))
        self._check_length(new[mark] if mark in new else self._longer.get(mark, 0) for mark in hashes)
        self._longer |= new
        while len(self._longer) > REMEMBERED:
            self._longer.pop(next(iter(self._longer)), None)  # the oldest
        return super()._merge_mm_kwargs(
            cache,
            mm_hashes=mm_hashes,
            mm_is_cached=mm_is_cached,
            mm_missing_kwargs=mm_missing_kwargs,
            mm_missing_prompt_updates=mm_missing_prompt_updates,
        )

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        pictures = mm_res.prompt_updates.get("image", [])
        self._check_length(map(_longer, pictures))
        applied = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        if _keep_of_dummies.get() is None:
            pruned = [
                of_picture[0].content for of_picture in pictures if isinstance(of_picture[0].content, PrunedDetails)
            ]
            count_tokens(sum(details.before for details in pruned), sum(details.after for details in pruned))
        return applied

    def _check_length(self, longer: Iterable[int]) -> None:
        """Raise ValueError where the unpruned prompt has more positions than the model."""
        if self._settings.positions == "compact" or _keep_of_dummies.get() is not None:
            return
        model = self.info.ctx.model_config
        limit = max(getattr(model.hf_text_config, "max_position_embeddings", 0), model.max_model_len)
        positions = _request.get().prompt + sum(longer)
        if positions > limit:
            way_out = "" if self._m_rope else ', or serve with "positions": "compact"'
            raise ValueError(
                f"without pruning this prompt has {positions} positions, which its tokens keep, and the model has "
                f"{limit}: send fewer pictures{way_out}"
            )

    # -- profiling

    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **kwargs: Any) -> Any:
        """The largest pictures at the highest `keep` of the server: no item has more placeholders."""
        return self._dummies(self._settings.highest, mm_counts, **kwargs)

    def fewest_embeddings(self, modality: str) -> int:
        """Of the largest item at the lowest `keep` of the server: a step encodes as many as its budget has room for."""
        inputs = self._dummies(self._settings.lowest, {modality: 1})
        return sum(item.get_num_embeds() for item in inputs["mm_placeholders"][modality])

    def _dummies(self, keep: float | int, counts: Mapping[str, int], **kwargs: Any) -> Any:
        token = _keep_of_dummies.set(keep)
        try:
            return super().get_dummy_mm_inputs(counts, **kwargs)
        finally:
            _keep_of_dummies.reset(token)


def _longer(updates: Sequence[Any]) -> int:
    return getattr(updates[0].content, "longer", 0)


def pruned_info(info: Any) -> Any:
    """A processing info whose items are counted by what the processor writes."""
    kind = type(info)

    def counted(self: Any, seq_len: int, mm_counts: Mapping[str, int]) -> None:
        return None

    return type(kind.__name__, (kind,), {"get_mm_max_tokens_per_item": counted})(info.ctx)
