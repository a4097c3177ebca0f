"""Synthetic inputs of `generate()` for the model of a configuration: noise for pictures and clips, random words.

How many tokens a picture has, and which ids mark it, is asked of its family.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from foveate.asking.mistake import Mistake
from foveate.families import get_family, unknown_family
from foveate.families.base import Family
from foveate.families.molmo2 import Molmo2
from foveate.families.paligemma import PaliGemma

from .clips import clips
from .pictures import pictures, written
from .wanted import WHOLE, WORD, Config, Inputs, Wanted

BEFORE, AFTER = 32, 32  # text tokens in front of the image and behind it
SHORTER = 16  # how much shorter every second sample of a padded batch is


def synthetic(
    config: Config,
    batch: int,
    *,
    tokens: int | None = None,
    frames: int | None = None,
    padded: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of `generate()` on the CPU: noise for one picture or clip a sample, random words around it.

    tokens: image tokens of each picture or frame, where the architecture takes pictures of any size. frames: of a clip,
    None for a picture. padded: make every second sample shorter, and pad it on the left.

    Raises:
        Mistake: for an architecture without synthetic inputs, or a number of tokens that it cannot give.
    """
    family = get_family(config)
    if family is None:
        raise Mistake(unknown_family(config.model_type))
    rng = torch.Generator().manual_seed(seed)
    if frames is None:
        wanted = Wanted(config, batch, 1, tokens, rng)
        pixels = pictures(family, wanted)
        shown = written(family, wanted, pixels)
    else:
        pixels, shown = clips(family, Wanted(config, batch, frames, tokens, rng))
    special = torch.tensor([value for name, value in _ids(config).items() if value > WHOLE])
    words = torch.arange(WORD, config.get_text_config().vocab_size)
    words = words[~torch.isin(words, special)]
    rows = []
    for row in range(batch):
        after = AFTER - SHORTER * (padded and row % 2 == 1)
        text = words[torch.randint(len(words), (BEFORE + after,), generator=rng)]
        rows.append(torch.cat([text[:BEFORE], torch.tensor(shown), text[BEFORE:]]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": mask, **pixels, **_beside(family, config, ids, pixels)}


def _ids(config: Config) -> dict[str, int]:
    """What the configuration says of tokens that are no words."""
    said = config.to_dict().items()
    return {name: value for name, value in said if name.endswith(("_id", "_index")) and isinstance(value, int)}


def _beside(family: Family, config: Config, ids: Tensor, pixels: Inputs) -> Inputs:
    """What the model's own signature asks for beside ids and pixels: the kinds of tokens, and who sees the image."""
    if "cross" in family.places:
        seen = (ids == family.image_token_id(config)).cumsum(1) > 0  # the words after the image look at it
        tiles = config.vision_config.max_num_tiles
        return {"cross_attention_mask": seen[:, :, None, None].expand(-1, -1, 1, tiles).long()}
    video = "pixel_values_videos" in pixels
    placeholder = family.video_token_id(config) if video else family.image_token_id(config)
    # To Molmo 2 frames are images.
    kinds = ids.eq(torch.tensor(placeholder)).int() * (2 if video and not isinstance(family, Molmo2) else 1)
    if isinstance(family, PaliGemma):  # all of it is a prompt, which sees itself both ways
        kinds = torch.zeros_like(kinds)
    model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    takes = () if model is None else inspect.signature(model.forward).parameters
    return {name: kinds for name in takes if name.endswith("token_type_ids")}
