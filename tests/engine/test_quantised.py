"""Quantised weights: pruning says what the equally quantised model says when the same keys are hidden.

Each library is optional; what is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import tiny
import torch
from cases import PLACES, TOLERANCE, pruned_run
from torch import nn

Quantise = Callable[[nn.Module], None]


def int8_of_torchao(module: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def int8_of_quanto(module: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(module, weights=quanto.qint8)
    quanto.freeze(module)


def nf4_of_bitsandbytes(module: nn.Module) -> None:
    bits = pytest.importorskip("bitsandbytes")

    def quantised(linear: nn.Linear) -> nn.Module:
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        new = bits.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bits.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to("cpu")

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, quantised(child))


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("quantise", [int8_of_torchao, int8_of_quanto, nf4_of_bitsandbytes], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("family", "name"), [p for p in PLACES if p[0] == "llava"])
def test_a_quantised_model_is_pruned_as_it_is(family, name, quantise):
    model, dense = tiny.build(family), tiny.build(family, "eager")
    batch = tiny.inputs(family, **tiny.BATCHES["ragged"])
    plain = oracle.run(dense, batch, max_new_tokens=6)
    for each in (model, dense):
        quantise(each.model.language_model)
    run, report = pruned_run(model, name, batch, max_new_tokens=6)
    assert (oracle.run(dense, batch, max_new_tokens=6).logits - plain.logits).abs().max() > 1e-3, "quantised at all"
    hides = oracle.hidden(report, batch["input_ids"].shape[1])
    assert oracle.errors(dense, batch, run, hides).max() < TOLERANCE
