"""The price of a prefill: floating point operations until the first token, whoever needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def counted(run: Callable[[], object]) -> int:
    """Operations of the matrix products and attention kernels that run in a call, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    # The kernels that torch's counter does not know.
    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        run()
    return int(counter.get_total_flops())


def prefill_flops(model: Any, inputs: Mapping[str, Any]) -> int:
    """Operations of matrix products and attention kernels that `generate()` runs up to its first token.

    Everything is counted that is really computed: vision encoder, padding, what a method computes to choose, a guide's
    whole answer, a second run beside the model. inputs: of `generate()`, on the model's device.
    """
    import torch

    with torch.inference_mode():
        return counted(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1))
