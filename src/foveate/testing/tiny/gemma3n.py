"""Gemma 3n: 4 x 4 tokens an image, of an encoder that is one convolution here: timm's own needs torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .base import BREAK, LLM, MARK, VISION_END, VISION_START, VOCAB
from .llava import SIDE, Llava
from .unread import UNREAD, Convolution


class Gemma3n(Llava):
    name, model_type, whole = "gemma3n", "gemma3n", False
    image_id, before, after, window = BREAK, (VISION_START,), (VISION_END,), 12
    refused = UNREAD

    def options(self) -> dict[str, Any]:
        text = CONFIG_MAPPING["gemma3n_text"](
            **LLM | {"num_hidden_layers": 6},
            head_dim=16,
            sliding_window=self.window,
            layer_types=["sliding_attention", "full_attention"] * 3,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            laurel_rank=8,
            altup_num_inputs=3,
            activation_sparsity_pattern=[0.0] * 6,
        )
        marks = dict(boi_token_id=VISION_START, eoi_token_id=VISION_END, boa_token_id=MARK, eoa_token_id=MARK)
        return dict(
            vision_config=dict(hidden_size=32, vocab_size=1, vocab_offset=94),
            audio_config=dict(vocab_size=1, vocab_offset=95),
            text_config=text,
            vision_soft_tokens_per_image=16,
            image_token_id=self.image_id,
            audio_token_id=MARK,
            **marks,
        )

    def make(self, config: PreTrainedConfig) -> PreTrainedModel:
        known = AutoModel.from_config
        stubs: dict[str, Callable[[], nn.Module]] = {
            "gemma3n_vision": lambda: Convolution(32, SIDE // 4),
            "gemma3n_audio": nn.Identity,
        }

        def from_config(config: PreTrainedConfig, **kwargs: Any) -> nn.Module:
            return stubs[config.model_type]() if config.model_type in stubs else known(config, **kwargs)

        with mock.patch.object(AutoModel, "from_config", from_config):
            return AutoModelForImageTextToText.from_config(config)

    def tokens(self, kind: int) -> int:
        return 16
