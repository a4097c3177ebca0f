"""Whether what methods before the LLM read of images is what the LLM sees of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.engine.session import prune
from foveate.evaluation.proving import generate
from foveate.methods.base import EncoderMethod, EncoderTokens

from .subjects import Subject

CLOSE = 1e-5  # of the largest number; where a projector is asked once more, rounding


@dataclass
class _Reader(EncoderMethod):
    """Keeps every other token, and the features that it is shown."""

    name, summary, source = "reader", "what a check reads", "this library"
    reads = frozenset({"features"})

    keep: float | int = 0.5
    shown: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def select(self, tokens: EncoderTokens, budget: Tensor) -> Tensor:
        assert tokens.features is not None
        self.shown += list(tokens.features)
        place = torch.arange(tokens.grid[0] * tokens.grid[1], device=tokens.device)
        return place < budget.unsqueeze(-1)


def check_features(subject: Subject) -> None:
    """Compare, on every prompt, the features of all tiles with the embeddings that enter the decoder.

    Raises:
        AssertionError: where they differ, which `Family.as_seen` mends.
    """
    model = subject.build(subject.backends[0])
    for prompt, inputs in subject.prompts.items():
        reader, entered = _Reader(), list[Tensor]()
        with torch.inference_mode(), prune(model, reader, record=True) as pruned:
            handle = pruned.decoder.register_forward_pre_hook(
                lambda module, args, kwargs, entered=entered: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
            )
            try:
                generate(model, inputs, 1)
            finally:
                handle.remove()
            report = pruned.report
        assert report is not None and report.image_tokens is not None
        for row, images in enumerate(report.image_tokens):
            for at in (image.positions[tile.index] for image in images for tile in image.tiles):
                seen = entered[0][row, at]
                alike = [each for each in reader.shown if each.shape == seen.shape]
                off = min((float((each - seen).abs().max()) for each in alike), default=None)
                what = f"{subject.family} ({prompt}): methods are shown other features than what the LLM sees"
                how = f"the nearest differ by {off:.1e}" if off is not None else f"none is of shape {tuple(seen.shape)}"
                assert off is not None and off <= CLOSE * float(seen.abs().max()), (
                    f"{what}: {how}; say by `as_seen` what the model does to them behind its encoder"
                )
