"""The price of a prefill: floating point operations until the first token, whoever needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prefill_flops(model: Any, inputs: Mapping[str, Any]) -> int:
    """Operations of matrix products and attention kernels that `generate()` runs up to its first token.

    Everything is counted that is really computed: vision encoder, padding, what a method computes to choose, a guide's
    whole answer, a second run beside the model. inputs: of `generate()`, on the model's device.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # The one kernel that torch's counter does not know.
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
    return int(counter.get_total_flops())
