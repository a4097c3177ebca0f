"""How sure a model is of its greedy answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Sure(LogitsProcessor):
    """Listens to `generate()`, and changes nothing: give it as `logits_processor=[sure]` with `do_sample=False`.

    ends: ids of the tokens that end an answer. Begins anew with every call of `generate()`.
    """

    def __init__(self, ends: Any) -> None:
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.long).view(-1)
        self._next = -1  # the width of the step that would go on with the same answers
        self._least = self._ended = torch.zeros(0)

    @classmethod
    def of(cls, model: Any) -> Sure:
        """One for this model."""
        return cls(model.generation_config.eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note how likely the next tokens are. input_ids: (batch, width); scores: (batch, vocabulary), as returned."""
        if input_ids.shape[1] != self._next:
            self._least = torch.zeros(len(input_ids), device=scores.device)
            self._ended = torch.zeros_like(self._least, dtype=torch.bool)
            self._ends = self._ends.to(input_ids.device)
        else:
            self._ended |= torch.isin(input_ids[:, -1], self._ends)
        likeliest = scores.float().log_softmax(-1).amax(-1)
        self._least = torch.where(self._ended, self._least, self._least.minimum(likeliest))
        self._next = input_ids.shape[1] + 1
        return scores

    @property
    def least(self) -> list[float]:
        """Of each answer, its end included, the probability of the token that was least sure; in [0, 1]."""
        return [float(value) for value in self._least.double().exp().tolist()]
