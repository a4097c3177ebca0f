"""The worker: a model that returns fewer embeddings for a picture, at the positions where its tokens were."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import PlaceholderRange

from ..methods.selection import select_tokens
from .metrics import Choosing
from .plan import Plan, packed
from .positions import Placed, check_offsets, columns_of, guessed, mended, unpruned
from .processor import PLAN
from .reading import EncoderReading
from .settings import Settings, uses_m_rope

Model: Any = Any if TYPE_CHECKING else object


class PrunedModel(Model):
    """Stands in front of any multimodal model class of vLLM."""

    supports_mrope = True
    supports_multimodal_pruning = True
    supports_encoder_cudagraph = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.is_multimodal_pruning_enabled = False  # films stay as they are
        model, self._config = vllm_config.model_config, vllm_config.model_config.hf_config
        self._settings = Settings.parse(self._config.foveate)
        self._m_rope = uses_m_rope(model)
        self._family = self._settings.check_model(self._config, self._m_rope)
        self._tracks = model.uses_mrope
        self._hidden = model.get_inputs_embeds_size()
        self._reading = EncoderReading(self, self._config, self._family, self._settings.method)
        self._choosing = Choosing()
        if self._tracks and not self._m_rope:
            lengthen_rotary(self.get_language_model(), vllm_config)

    # -- fewer embeddings

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The embeddings of the tokens that stay, for each picture, with columns that say where they were."""
        numbers = kwargs.pop(PLAN, None)
        if numbers is None:  # films, and pictures that were encoded elsewhere
            return super().embed_multimodal(**kwargs)
        plans = [Plan.read(each) for each in numbers]
        if any(plan.prunes for plan in plans):
            with self._reading as reading:
                features = list(super().embed_multimodal(**kwargs))
                start = time.perf_counter()
                layouts = packed(plans)
                kept = self._choose(plans, layouts, features, reading.patches(layouts))
                seconds = time.perf_counter() - start
            before, after = sum(plan.layout.tokens for plan in plans), sum(plan.kept for plan in plans)
            self._choosing.add(len(plans), before, after, seconds)
        else:
            kept = [(feature, torch.arange(len(feature))) for feature in super().embed_multimodal(**kwargs)]
        if not self._tracks:
            return [rows for rows, _ in kept]
        offsets = [plan.offsets(index, self._m_rope) for plan, (_, index) in zip(plans, kept, strict=True)]
        return [
            torch.cat([rows, columns_of(offset.T.to(rows.device), rows.dtype)], 1)
            for (rows, _), offset in zip(kept, offsets, strict=True)
        ]

    def _choose(
        self, plans: Sequence[Plan], layouts: Sequence[Any], features: Sequence[Tensor], patches: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each picture the embeddings that stay, and which tokens these are. Equal ones are chosen together."""
        projector = self._family.projector(self)
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, plan in enumerate(plans):
            # Where several patches join into a token nothing leads from states to features.
            joins = any(tile.patches.ndim > 1 for tile in plan.layout.tiles)
            alike.setdefault((plan.budget, joins), []).append(i)
        kept: list[Any] = [None] * len(plans)
        for (budget, joins), own in alike.items():
            read = {name: values for name, values in patches.items() if not (joins and name == "states")}
            chosen = select_tokens(
                replace(self._settings.method, keep=budget),
                [layouts[i] for i in own],
                # Behind the hidden states may stand what later layers add to them.
                [features[i][:, : self._hidden] for i in own],
                read,
                projector if projector is not None and "states" in read else lambda states: states,
            )
            stays = torch.cat([each.stays for each in chosen]).cpu()  # waits for the device once
            parts = stays.split([layouts[i].tokens for i in own])
            for i, keep, each in zip(own, parts, chosen, strict=True):
                index, merged = keep.nonzero()[:, 0], each.features
                if len(index) != plans[i].kept:
                    raise RuntimeError(
                        f"{self._settings.method.name} kept {len(index)} tokens of a picture, not {plans[i].kept}"
                    )
                here = index.to(merged.device)
                rows = torch.cat([merged[here], features[i][here, self._hidden :]], 1)
                kept[i] = (self._woven(plans[i], rows, index) if plans[i].woven else rows), index
        return kept

    def _woven(self, plan: Plan, rows: Tensor, index: Tensor) -> Tensor:
        """A picture's embeddings with those of the structure between them. index: which tokens they are of."""
        places = plan.places(index)
        image = plan.embeds[places]
        token, between = (which.nonzero()[:, 0].to(rows.device) for which in (image, ~image))
        words = plan.full[places][~image].to(rows.device)
        whole = rows.new_empty(len(places), rows.shape[1]).index_copy_(0, token, rows)
        return whole.index_copy_(0, between, self.get_language_model().embed_input_ids(words).to(rows.dtype))

    # -- positions

    def get_mrope_input_positions(self, input_tokens: Any, mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Those in the unpruned prompt; of tokens that are not chosen yet, a guess."""
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        items = [
            Placed(feature.mm_position.offset, feature.mm_position.length, _plan(feature.data)) for feature in features
        ]
        prompt = unpruned(list(input_tokens), items)
        longer = len(prompt.tokens) - len(input_tokens)
        if not self._m_rope:
            return guessed(prompt, items, None), longer
        spans = zip(features, prompt.starts, prompt.lengths, strict=True)
        moved = [
            SimpleNamespace(modality=f.modality, data=f.data, mm_position=PlaceholderRange(offset=start, length=length))
            for f, start, length in spans
        ]
        full, delta = super().get_mrope_input_positions(prompt.tokens, moved)
        check_offsets(prompt, items, full)
        return guessed(prompt, items, full), delta + longer

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """Those of the pictures of this step; called again it changes nothing more."""
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        media = ids == self._family.image_token_id(self._config)
        film = self._family.video_token_id(self._config)
        media = media if film is None else media | (ids == film)
        return mended(
            mrope_positions, media, num_computed_tokens, multimodal_embeddings, self._hidden, m_rope=self._m_rope
        )

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model; the first row of the table is all that a language model with plain RoPE reads."""
        if positions.ndim == 2 and not self._m_rope:
            positions = positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)


def _plan(data: Any) -> Plan | None:
    numbers = None if data is None else data.get(PLAN)
    return None if numbers is None else Plan.read(numbers.data)


def lengthen_rotary(language_model: Any, vllm_config: Any) -> None:
    """Make room in the tables of rotary positions for those of unpruned prompts and of what is generated behind them.

    Kernels read beyond the end of a table without saying so.

    Raises:
        ValueError: where a longer table would change what stands in it.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    model = vllm_config.model_config
    limit = max(getattr(model.hf_text_config, "max_position_embeddings", 0), model.max_model_len)
    for rotary in {module for module in language_model.modules() if isinstance(module, RotaryEmbeddingBase)}:
        old, size = rotary.cos_sin_cache, rotary.max_position_embeddings
        wanted = limit + model.max_model_len
        if len(old) >= wanted:
            continue
        rotary.max_position_embeddings = -(-size * wanted // len(old))
        new = rotary._compute_cos_sin_cache().to(old)
        rotary.max_position_embeddings = size
        if len(new) < wanted or not torch.equal(new[: len(old)], old):
            raise ValueError(
                "the rotary positions of this model depend on how many there are, so that those of the unpruned prompt "
                'cannot be kept: serve with "positions": "compact"'
            )
        rotary.register_buffer("cos_sin_cache", new, persistent=False)
