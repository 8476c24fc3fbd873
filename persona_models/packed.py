"""Linear layers laid out for few rows on a CPU, where the time goes into reading weights.

Measured on 2 cores with AVX2 (docs/LOG.md), (n, 256) times (768, 256) from the L3 cache: float32 92 us at one row and 145 at 16; the same numbers kept
as float16 and multiplied in float32, 28 and 58; float32 in oneDNN's own layout, 65 and 85. Knows nothing of models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
# What rounding to float16 may change in a weight: below this, numbers of a bfloat16 checkpoint are subnormal in float16.
HARMLESS = 1e-7
# Rows that oneDNN lays the weight out for; others work too.
USUAL_ROWS = 16


def packed(weight: Tensor, bias: Tensor | None = None) -> Product:
    """x: (n, in) float32 -> x W^T + bias, (n, out), by the fastest way that this machine has and that keeps every weight's value.

    weight: (out, in). Float16 only where it loses nothing, which is so for checkpoints saved in bfloat16 or float16.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: nn.functional.linear(x, weight, bias)
    if torch.equal(weight, weight.half().float()) or float((weight - weight.half().float()).abs().max()) <= HARMLESS:
        found = _float16(weight, bias)
        if found:
            return found
    return _onednn(weight, bias) or (lambda x: nn.functional.linear(x, weight, bias))


def _float16(weight: Tensor, bias: Tensor | None) -> Product | None:
    """fbgemm's product of float32 inputs and float16 weights; x86 only."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    except (AttributeError, RuntimeError):
        return None
    product = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: product(x, kept)


def _onednn(weight: Tensor, bias: Tensor | None) -> Product | None:
    try:
        kept = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
    except (AttributeError, RuntimeError):
        return None
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, kept, bias, "none", [], "")
